"""What is said of a place before the work whose result shall stand there."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from inward.errors import SetupError
from inward.files import whole
from inward.heads import store
from inward.offline.places import check_file, check_head, check_page, check_states
from inward.offline.states.saved import save_states
from support.small_heads import legend, pair_states


@pytest.mark.parametrize("name", ["my head", "", ".hidden", "ü", "a/b", "x" * 65, "name\n"])
def test_a_name_that_no_head_may_have_is_refused(tmp_path, name):
    with pytest.raises(SetupError, match=r"can't be a head's name.*--out, or say --name"):
        check_head(tmp_path / "head", name, replace=False)


def test_a_head_takes_the_place_of_a_head_and_of_nothing_else(tmp_path):
    store.save(legend(), tmp_path / "head")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for name in ("head", "empty", "other"):
        with pytest.raises(SetupError, match="--replace"):
            check_head(tmp_path / name, "legend", replace=False)
    for name in ("head", "empty", "new/one"):
        check_head(tmp_path / name, "legend", replace=True)
    for path in (tmp_path / "other", tmp_path, tmp_path / "other" / "thesis.tex"):
        with pytest.raises(SetupError, match="holds no head"):
            check_head(path, "legend", replace=True)
    with pytest.raises(SetupError, match=r"thesis.tex is not a folder"):
        check_head(tmp_path / "other" / "thesis.tex" / "head", "legend", replace=False)


@pytest.mark.parametrize("check", [check_page, check_states])
def test_a_file_is_written_over_one_of_its_own_kind_only(tmp_path, check):
    (tmp_path / "page.html").write_text("<!DOCTYPE html>\n<p>")
    save_states(pair_states(n=5), tmp_path / "states")
    save_file({"direction": np.zeros(3, dtype=np.float32)}, tmp_path / "head.safetensors")
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\n")
    (tmp_path / "empty").touch()
    own = {check_page: "page.html", check_states: "states"}[check]
    for name in (own, "empty", "new", "folder/new"):
        check(tmp_path / name)
    for name in {"page.html", "states", "head.safetensors", "rows.csv"} - {own}:
        with pytest.raises(SetupError, match=f"{name} is there already and is no "):
            check(tmp_path / name)


def test_a_folder_a_device_and_what_lies_below_a_file_are_no_places_for_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path, "is a folder: name a file in it"),
        (os.devnull, "standard output or a device"),
        (tmp_path / "file" / "new", "file is not a folder"),
    ):
        with pytest.raises(SetupError, match=said):
            check_file(type(tmp_path)(path), "page")


def test_a_folder_that_can_not_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(SetupError, match=f"{tmp_path} can't be written to"):
        check_file(tmp_path / "new" / "page.html", "page")


def test_a_page_is_written_to_what_a_link_names(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    page = tmp_path / "real/page.html"
    page.write_text("old")
    link = tmp_path / "latest.html"
    link.symlink_to(page)
    with whole(link) as unfinished:
        unfinished.write_text("new")
    assert link.is_symlink() and page.read_text() == "new"
    assert sorted(one.name for one in page.parent.iterdir()) == ["page.html"]
