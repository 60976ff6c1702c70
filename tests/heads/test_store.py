import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from inward.errors import HeadError, NotFound
from inward.heads import store
from inward.heads.legend import LegendHead
from support.small_heads import legend, manifest

SERVED = {"fingerprint": "sha256:tiny", "template": "format:{prompt}{response}", "depth": 4, "width": 4}


@pytest.fixture
def folder(tmp_path):
    return store.save(legend(), tmp_path / "heads" / "legend")


def edit(folder, **changes):
    path = folder / "head.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(folder, **tensors):
    save_file(tensors, folder / "head.safetensors")


def test_a_head_comes_back_as_it_was_saved(folder):
    head = store.load(folder, **SERVED)
    assert head.manifest == legend().manifest
    assert np.array_equal(head.tensors()["direction"], legend().tensors()["direction"])


def test_saving_leaves_only_the_two_files(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["head.json", "head.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["legend"]


def test_saving_refuses_to_overwrite_unless_told(folder):
    with pytest.raises(HeadError, match="exists already"):
        store.save(legend(seed=1), folder)
    assert np.array_equal(store.load(folder).tensors()["direction"], legend().tensors()["direction"])
    store.save(legend(seed=1), folder, replace=True)
    assert np.array_equal(store.load(folder).tensors()["direction"], legend(seed=1).tensors()["direction"])
    assert [p.name for p in folder.parent.iterdir()] == ["legend"]


def test_a_save_that_fails_midway_leaves_the_old_head(folder, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", full)
    with pytest.raises(HeadError, match="No space left"):
        store.save(legend(seed=1), folder, replace=True)
    assert np.array_equal(store.load(folder).tensors()["direction"], legend().tensors()["direction"])
    assert [p.name for p in folder.parent.iterdir()] == ["legend"]


def test_saving_refuses_a_head_that_is_not_finite(tmp_path):
    head = legend()
    head.direction[1] = np.nan
    with pytest.raises(HeadError, match=r"direction.*NaN"):
        store.save(head, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_head_of_another_backbone_is_refused_naming_both_and_the_way_out(folder):
    with pytest.raises(HeadError) as refused:
        store.load(folder, fingerprint="sha256:other", backbone="big")
    for part in ("tiny", "sha256:tiny", "big", "sha256:other", "inward fit legend"):
        assert part in refused.value.message


def test_a_head_of_another_template_is_refused(folder):
    with pytest.raises(HeadError, match=r"template.*inward fit"):
        store.load(folder, template="chat:abc")


@pytest.mark.parametrize("keep", [0, 4, 60, -4])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / "head.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(HeadError, match=r"head\.safetensors is damaged or cut short"):
        store.load(folder)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_tensors_that_are_not_finite_are_refused_by_name(folder, poison):
    direction = load_file(folder / "head.safetensors")["direction"]
    direction[2] = poison
    retensor(folder, direction=direction)
    with pytest.raises(HeadError, match="'direction' has NaN or infinite"):
        store.load(folder)


def test_float64_beyond_float32_is_refused(folder):
    retensor(folder, direction=np.array([1e300, 0, 0, 0]))
    with pytest.raises(HeadError, match="infinite"):
        store.load(folder)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({}, "lacks direction"),
        ({"direction": np.eye(4, dtype=np.float32)[0], "bias": np.zeros(1, np.float32)}, "does not: bias"),
        ({"direction": np.eye(4, dtype=np.float32)}, r"shape \[4, 4\]"),
        ({"direction": np.array([1, 0, 0, 0])}, "not floating point: direction"),
        ({"direction": np.array([3, 0, 0, 0], np.float32)}, "length 3"),
    ],
)
def test_tensors_that_do_not_belong_to_the_manifest_are_refused(folder, tensors, problem):
    retensor(folder, **tensors)
    with pytest.raises(HeadError, match=problem):
        store.load(folder)


def test_a_future_format_is_refused_with_advice_to_upgrade(folder):
    edit(folder, format_version=2, brand_new_field=1)
    with pytest.raises(HeadError, match=r"format_version 2.*upgrade Inward"):
        store.load(folder)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"kind": "magic"}, "kind"), ({"version": 0}, "version"), ({"name": "../up"}, "name"),
     ({"backbone": {}}, "backbone.name"), ({"surprise": 1}, "surprise"), ({"layers": "two"}, "layers")],
)  # fmt: skip
def test_a_manifest_that_does_not_validate_names_the_field(folder, changes, field):
    edit(folder, **changes)
    with pytest.raises(HeadError, match=f"head.json: {field}: "):
        store.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"head"'])
def test_a_manifest_that_is_no_json_object_is_refused(folder, text):
    (folder / "head.json").write_text(text)
    with pytest.raises(HeadError, match=r"head\.json"):
        store.load(folder)


@pytest.mark.parametrize("layers", [[9], [-1], [], [1, 2]])
def test_layers_that_the_backbone_or_the_kind_does_not_have_are_refused(folder, layers):
    edit(folder, layers=layers)
    with pytest.raises(HeadError, match="layer"):
        store.load(folder, depth=4)


def test_a_final_norm_that_the_backbone_does_not_have_there_is_refused(folder):
    edit(folder, layers=[4], final_norm=True)
    assert store.load(folder, **SERVED).readout.taps[0].final_norm
    with pytest.raises(HeadError, match="the-model does not have"):
        store.load(folder, **SERVED, final_norm=False, backbone="the-model")
    edit(folder, layers=[2], final_norm=True)
    with pytest.raises(HeadError, match=r"reads layer 2: only the last layer, 4"):
        store.load(folder, **SERVED)


def test_a_head_of_another_width_is_refused(folder):
    with pytest.raises(HeadError, match=r"width \[4\].*8 wide"):
        store.load(folder, width=8)


@pytest.mark.parametrize(
    "calibration", [{"margin_std": -1, "bin_edges": [], "bin_values": [0]}, {"margin_std": 1}, {"margin_std": "x"}]
)
def test_calibration_that_cannot_be_used_is_refused(folder, calibration):
    edit(folder, calibration=calibration)
    with pytest.raises(HeadError, match="calibration"):
        store.load(folder)


def test_missing_files_are_named(tmp_path, folder):
    with pytest.raises(HeadError, match=r"no head\.json"):
        store.load(tmp_path)
    (folder / "head.safetensors").unlink()
    with pytest.raises(HeadError, match=r"no head\.safetensors"):
        store.load(folder)


def test_a_pickle_in_place_of_the_tensors_is_not_executed(folder, tmp_path):
    proof = tmp_path / "executed"
    (folder / "head.safetensors").write_bytes(b"cos\nsystem\n(S'touch " + str(proof).encode() + b"'\ntR.")
    with pytest.raises(HeadError, match="damaged"):
        store.load(folder)
    assert not proof.exists()


def test_find_lists_bare_folders_and_version_folders(tmp_path):
    store.save(legend(name="bare"), tmp_path / "bare")
    store.save(legend(name="bare", version=2), tmp_path / "bare" / "2")
    store.save(legend(name="tiered", version=10), tmp_path / "tiered" / "10")
    store.save(legend(name="tiered", version=9), tmp_path / "tiered" / "9")
    (tmp_path / "tiered" / ".9-unfinished").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("not a head")
    found = [(f.name, f.version, f.kind, f.path.relative_to(tmp_path).as_posix()) for f in store.find(tmp_path)]
    assert found == [
        ("bare", 1, "legend", "bare"), ("bare", 2, "legend", "bare/2"),
        ("tiered", 9, "legend", "tiered/9"), ("tiered", 10, "legend", "tiered/10"),
    ]  # fmt: skip


def test_find_takes_the_folder_of_a_single_head(folder):
    assert [f.path for f in store.find(folder)] == [folder]


def test_two_folders_with_one_name_are_refused(tmp_path):
    store.save(legend(), tmp_path / "a")
    store.save(legend(version=2), tmp_path / "b")
    with pytest.raises(HeadError, match="both hold head 'legend'"):
        store.find(tmp_path)


def test_a_heads_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(HeadError, match="does not exist"):
        store.find(tmp_path / "nowhere")


def test_the_active_path_is_the_highest_version_until_another_is_recorded(tmp_path):
    for version in (1, 2, 3):
        store.save(legend(version=version), tmp_path / "legend" / str(version))
    assert store.active_path(tmp_path, "legend").name == "3"
    store.write_state(tmp_path / "legend", store.State(2))
    assert store.active_path(tmp_path, "legend").name == "2"
    with pytest.raises(NotFound, match="there are: legend"):
        store.active_path(tmp_path, "other")


def test_shape_errors_say_what_the_other_tensors_imply():
    with pytest.raises(HeadError, match=r"'direction' has shape \[2, 4\]"):
        LegendHead.from_tensors(manifest(), {"direction": np.zeros((2, 4), np.float32)})
