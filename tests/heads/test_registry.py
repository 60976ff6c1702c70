import asyncio
import threading

import numpy as np
import pytest

from inward.errors import Conflict, HeadError, NotFound
from inward.heads import store
from inward.heads.registry import Registry
from inward.types import BackboneInfo
from support.small_heads import legend

INFO = BackboneInfo("tiny", "", "sha256:tiny", 4, 4, 512, "float32", "cpu")
TEMPLATE = "format:{prompt}{response}"


@pytest.fixture
def heads(tmp_path):
    store.save(legend(), tmp_path / "legend")
    store.save(legend(name="another", seed=5), tmp_path / "another" / "1")
    return tmp_path


def opened(heads):
    return Registry.open(heads, info=INFO, template=TEMPLATE)


def test_the_default_of_a_kind_is_the_head_named_like_it(heads):
    assert opened(heads).resolve().ref.name == "legend"
    assert opened(heads).resolve(None, ("srr", "legend")).ref.name == "legend"
    assert opened(heads).resolve("another").ref.name == "another"


def test_what_is_not_there_is_not_found_and_the_message_lists_what_is(heads):
    for name, kinds in (("nope", ("legend",)), (None, ("srr",)), ("legend", ("hybrid", "srr"))):
        with pytest.raises(NotFound, match=r"another \(legend\), legend \(legend\)"):
            opened(heads).resolve(name, kinds)
    with pytest.raises(NotFound, match="no head is loaded"):
        Registry().resolve()


def test_a_refused_head_refuses_the_start(heads):
    with pytest.raises(HeadError, match="refit"):
        Registry.open(heads, info=BackboneInfo("big", "", "sha256:other", 4, 4, 512, "float32", "cpu"))


def test_the_listing_names_what_the_routes_and_the_command_show(heads):
    listing = opened(heads).listing()
    assert [(h["name"], h["kind"], h["version"], h["versions"]) for h in listing] == [
        ("another", "legend", 1, [1]), ("legend", "legend", 1, [1]),
    ]  # fmt: skip
    assert listing[1]["path"] == str(heads / "legend")
    assert listing[1]["backbone"]["fingerprint"] == "sha256:tiny"


def test_the_listing_tells_how_many_prompts_were_in_the_fit_and_not_which(tmp_path):
    kept = {"count": 3, "hashes": 7, "filter": "AAAA"}
    head = legend()
    fit = {**head.manifest.fit, "prompts": kept}
    store.save(
        type(head).from_tensors(head.manifest.model_copy(update={"fit": fit}), head.tensors()), tmp_path / "legend"
    )
    (row,) = opened(tmp_path).listing()
    assert row["fit"] == {**fit, "prompts": {"count": 3}}


def test_a_new_version_is_served_listed_and_survives_a_restart(heads):
    registry = opened(heads)
    added = registry.add_version(legend(seed=1))
    assert (added.ref.version, registry.resolve("legend").ref.version, registry.versions("legend")) == (2, 2, [1, 2])
    again = opened(heads)
    assert again.resolve("legend").ref.version == 2
    assert np.array_equal(again.resolve("legend").tensors()["direction"], legend(seed=1).tensors()["direction"])


def test_rolling_back_survives_a_restart_and_the_next_version_has_a_fresh_number(heads):
    registry = opened(heads)
    registry.add_version(legend(seed=1))
    registry.activate("legend", 1)
    again = opened(heads)
    assert (again.resolve("legend").ref.version, again.versions("legend")) == (1, [1, 2])
    assert again.add_version(legend(seed=2)).ref.version == 3


def test_activating_what_does_not_exist_changes_nothing(heads):
    registry = opened(heads)
    with pytest.raises(NotFound, match="no version 7; there are: 1"):
        registry.activate("legend", 7)
    with pytest.raises(NotFound, match="no head 'nope'"):
        registry.activate("nope", 1)
    assert registry.resolve("legend").ref.version == 1


def test_activating_a_damaged_version_keeps_the_active_one(heads):
    registry = opened(heads)
    registry.add_version(legend(seed=1))
    (heads / "legend" / "head.safetensors").write_bytes(b"gone")
    with pytest.raises(HeadError):
        registry.activate("legend", 1)
    assert registry.resolve("legend").ref.version == opened(heads).resolve("legend").ref.version == 2


def test_a_snapshot_never_changes_under_its_reader(heads):
    registry = opened(heads)
    before = registry.snapshot()
    registry.add_version(legend(seed=1))
    assert before.resolve("legend").ref.version == 1
    with pytest.raises(TypeError):
        before.loaded["legend"] = None


def test_a_repeated_sequence_changes_nothing_and_gives_the_same_version(heads):
    registry = opened(heads)
    assert registry.applied("legend", 1) is None
    first = registry.add_version(legend(seed=1), sequence=1)
    repeat = registry.add_version(legend(seed=9), sequence=1)
    assert (first.ref, registry.versions("legend")) == (repeat.ref, [1, 2])
    assert np.array_equal(registry.resolve("legend").tensors()["direction"], legend(seed=1).tensors()["direction"])


def test_a_repeat_after_a_restart_or_a_roll_back_still_gives_that_version(heads):
    opened(heads).add_version(legend(seed=1), sequence=1)
    registry = opened(heads)
    registry.activate("legend", 1)
    repeat = registry.applied("legend", 1)
    assert repeat is not None
    assert (repeat.ref.version, registry.resolve("legend").ref.version) == (2, 1)


@pytest.mark.parametrize("sequence", [-1, 0, 1, 4])
def test_a_stale_or_gapped_sequence_is_a_conflict_that_says_what_is_expected(heads, sequence):
    registry = opened(heads)
    registry.add_version(legend(seed=1), sequence=1)
    registry.add_version(legend(seed=2), sequence=2)
    with pytest.raises(Conflict, match="expects update sequence 3") as conflict:
        registry.add_version(legend(seed=3), sequence=sequence)
    assert conflict.value.param == "sequence"
    assert registry.versions("legend") == [1, 2, 3]


def test_an_update_cut_off_before_it_was_recorded_is_applied_once(heads, monkeypatch):
    registry = opened(heads)
    write, calls = store.write_state, []

    def crash_at_the_end(root, state):
        calls.append(state)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(root, state)

    monkeypatch.setattr(store, "write_state", crash_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        registry.add_version(legend(seed=1), sequence=1)
    monkeypatch.undo()
    again = opened(heads)
    assert again.resolve("legend").ref.version == 1
    assert again.applied("legend", 1) is None
    again.add_version(legend(seed=1), sequence=1)
    assert np.array_equal(opened(heads).resolve("legend").tensors()["direction"], legend(seed=1).tensors()["direction"])


def test_concurrent_writers_get_different_versions(heads):
    registry = opened(heads)
    threads = [threading.Thread(target=registry.add_version, args=(legend(seed=i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.versions("legend") == opened(heads).versions("legend") == list(range(1, 10))


async def test_of_concurrent_updates_with_one_sequence_number_one_is_applied(heads):
    registry = opened(heads)
    results = await asyncio.gather(
        *[asyncio.to_thread(registry.add_version, legend(seed=i), sequence=1) for i in range(6)]
    )
    assert {head.ref.version for head in results} == {2}
    assert registry.versions("legend") == [1, 2]


def test_damaged_state_is_refused_with_advice(heads):
    for text in ("{", "[]", '{"version": "x"}', '{"sequence": 1}', '{"version": 7}'):
        (heads / "legend" / "active.json").write_text(text)
        with pytest.raises(HeadError, match=r"active\.json"):
            opened(heads)


def test_reload_picks_up_a_head_that_was_copied_in(heads):
    registry = opened(heads)
    store.save(legend(name="late"), heads / "late")
    registry.reload()
    assert registry.names() == ["another", "late", "legend"]


def test_a_reload_that_fails_keeps_what_is_served(heads):
    registry = opened(heads)
    (heads / "another" / "1" / "head.safetensors").write_bytes(b"gone")
    with pytest.raises(HeadError):
        registry.reload()
    assert registry.names() == ["another", "legend"]


def test_heads_in_memory_are_served_but_not_updated():
    registry = Registry([legend()])
    assert registry.activate("legend", 1).ref.version == 1
    with pytest.raises(HeadError, match="memory only"):
        registry.add_version(legend(seed=1))
    assert registry.show("legend")["path"] is None


def updated(registry, times):
    """Online updates, as far as the registry knows of them."""
    for sequence in range(1, times + 1):
        head = legend(seed=sequence)
        fit = {**head.manifest.fit, "online_steps": sequence}
        manifest = head.manifest.model_copy(update={"fit": fit})
        registry.add_version(type(head).from_tensors(manifest, head.tensors()), sequence=sequence)


def test_of_the_versions_that_updates_made_the_newest_are_kept_beside_what_was_fitted(heads, monkeypatch):
    monkeypatch.setattr("inward.heads.registry.KEPT_UPDATES", 3)
    store.save(legend(version=2), heads / "legend" / "2")  # fitted as well
    registry = opened(heads)
    updated(registry, 8)
    assert registry.versions("legend") == [1, 2, 8, 9, 10]
    assert sorted(path.name for path in (heads / "legend").iterdir() if path.is_dir()) == ["10", "2", "8", "9"]
    assert opened(heads).versions("legend") == registry.versions("legend")
    assert registry.applied("legend", 8).ref.version == 10


def test_a_version_that_is_served_or_was_made_last_is_not_pruned(heads, monkeypatch):
    monkeypatch.setattr("inward.heads.registry.KEPT_UPDATES", 1)
    registry = opened(heads)
    updated(registry, 3)
    registry.activate("legend", 1)
    assert registry.versions("legend") == [1, 4]
    assert registry.applied("legend", 3).ref.version == 4


def test_reading_the_folder_again_reads_only_what_has_changed(heads, monkeypatch):
    registry, other = opened(heads), opened(heads)
    read = []
    for name in ("load_manifest", "load"):
        real = getattr(store, name)
        monkeypatch.setattr(
            store,
            name,
            lambda path, *a, real=real, name=name, **k: read.append((name, path.name)) or real(path, *a, **k),
        )
    registry.reload()
    assert read == []
    other.add_version(legend(seed=1))
    read.clear()
    registry.reload()
    assert read == [("load_manifest", "2"), ("load", "2"), ("load_manifest", "2")]  # loading reads it again
    assert registry.resolve("legend").ref.version == 2
    read.clear()
    store.save(legend(name="another", seed=6), heads / "another" / "1", replace=True)
    registry.reload()
    assert {path for _, path in read} == {"1"}


def test_a_version_that_vanishes_while_the_folder_is_read_is_no_error(heads):
    registry = opened(heads)
    registry.add_version(legend(seed=1))

    def read(path):
        if path.name == "2":
            store.remove(path)
        return store.load_manifest(path)

    assert [(found.name, found.version) for found in store.find(heads, read=read)] == [("another", 1), ("legend", 1)]
