import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from inward.errors import DataError
from inward.offline.states.saved import Origin, load_states, save_states
from inward.offline.states.stored import PairWriter, SomeLayers, StoredPairs, Subset, blocks
from support.small_heads import BACKBONE, pair_states

SHAPE = (5, 2, 3)
ORIGIN = Origin("eos", backbone=BACKBONE, template="t", data_hash="sha256:x")


def writer(path, **changes):
    fields = {"layers": (1, 4), "groups_N": np.arange(5), "length_difference_N": np.zeros(5), "origin": ORIGIN}
    return PairWriter(path, SHAPE, **{**fields, **changes})


def states(scale=1.0):
    rng = np.random.default_rng(0)
    return (scale * rng.normal(size=(2, *SHAPE))).astype(np.float16).astype(np.float32)


def fill(one, values, rows=range(5)):
    for row in rows:
        one.put(row, chosen=True, states_LD=values[0, row])
        one.put(row, chosen=False, states_LD=values[1, row])
        one.commit([row])


def test_what_is_read_a_few_rows_at_a_time_is_what_was_saved(tmp_path):
    saved = pair_states()
    save_states(saved, tmp_path / "s.safetensors")
    stored = StoredPairs.open(tmp_path / "s.safetensors")
    assert (stored.layers, stored.origin) == (saved.layers, saved.origin)
    index = np.array([7, 8, 9, 3, 100])
    for axes in (None, [1], [2, 0]):
        for mine, theirs in zip(stored.take(index, axes), saved.take(index, axes), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(
        np.concatenate([chosen for _, chosen, _ in blocks(stored, [1])])[:, 0], saved.at(2)[0]
    )


def test_a_subset_is_the_rows_it_names(tmp_path):
    saved = pair_states()
    part = Subset(saved, np.array([5, 50, 2]))
    np.testing.assert_array_equal(part.take(np.array([1]))[0], saved.chosen_NLD[[50]])
    assert list(part.groups_N) == list(saved.groups_N[[5, 50, 2]]) and len(part) == 3


def test_some_layers_are_those_they_name(tmp_path):
    saved = replace(pair_states(), origin=replace(ORIGIN, final_norm=True))
    save_states(saved, tmp_path / "s.safetensors")
    stored = StoredPairs.open(tmp_path / "s.safetensors")
    assert SomeLayers.of(stored, (1, 2, 3)) is stored
    some = SomeLayers.of(stored, (1, 3))
    index = np.array([7, 3])
    for axes, numbers in ((None, [1, 3]), ([1], [3]), ([1, 0], [3, 1])):
        for mine, theirs in zip(some.take(index, axes), saved.take(index, [k - 1 for k in numbers]), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert (some.layers, len(some), some.width) == ((1, 3), 120, 12)
    assert some.origin.final_norm and not SomeLayers.of(stored, (1, 2)).origin.final_norm
    with pytest.raises(DataError, match="layer 4 is not among"):
        SomeLayers.of(stored, (3, 4))


def test_bfloat16_is_read_as_it_is(tmp_path):
    values = torch.randn(2, *SHAPE).to(torch.bfloat16)
    save_torch({"chosen": values[0], "rejected": values[1], "layers": torch.tensor([1, 4])}, tmp_path / "b.safetensors")
    stored = StoredPairs.open(tmp_path / "b.safetensors")
    np.testing.assert_array_equal(stored.take(np.arange(5))[1], values[1].float().numpy())
    whole = load_states(tmp_path / "b.safetensors")
    assert stored.origin.data_hash == whole.origin.data_hash
    np.testing.assert_array_equal(stored.groups_N, whole.groups_N)


def test_a_written_file_is_a_file_of_states(tmp_path):
    values = states()
    one = writer(tmp_path / "deep" / "w.safetensors")
    fill(one, values)
    stored = one.close()
    whole = load_states(tmp_path / "deep" / "w.safetensors")
    np.testing.assert_array_equal(whole.chosen_NLD, values[0])
    np.testing.assert_array_equal(stored.take(np.arange(5))[1], values[1])
    assert (whole.layers, whole.origin) == ((1, 4), ORIGIN)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["w.safetensors"], "nothing is left lying about"


def test_states_beyond_float16_make_the_file_wider(tmp_path):
    values = states()
    values[1, 3, 1, 2] = 1e6
    one = writer(tmp_path / "w.safetensors")
    fill(one, values)
    np.testing.assert_array_equal(one.close().take(np.arange(5))[1], values[1])


def test_an_unfinished_file_is_gone_on_with(tmp_path):
    values = states()
    first = writer(tmp_path / "w.safetensors")
    fill(first, values, [0, 2])
    first.put(3, chosen=True, states_LD=values[0, 3])  # and then the process ended
    assert not (tmp_path / "w.safetensors").exists()
    second = writer(tmp_path / "w.safetensors")
    assert second.done == {0, 2}
    fill(second, values, [1, 3, 4])
    np.testing.assert_array_equal(second.close().take(np.arange(5))[0], values[0])


def test_an_unfinished_file_of_other_rows_is_not(tmp_path):
    fill(writer(tmp_path / "w.safetensors"), states(), [0, 1])
    assert writer(tmp_path / "w.safetensors", origin=replace(ORIGIN, data_hash="sha256:y")).done == set()


@pytest.mark.parametrize("damage", ["short", "nan", "lists", "text", "missing", "shape", "origin", "group", "layers"])
def test_a_file_that_cannot_be_used_is_refused_and_named(tmp_path, damage):
    path = tmp_path / "s.safetensors"
    save_states(pair_states(), path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if damage == "short":
        path.write_bytes(content[:-100])
    elif damage == "nan":
        save_torch(
            {"chosen": torch.full(SHAPE, float("nan")), "rejected": torch.zeros(SHAPE), "layers": torch.tensor([1, 2])},
            path,
        )
    elif damage == "lists":
        save_torch({"prompt": torch.zeros(SHAPE), "layers": torch.tensor([1, 2])}, path)
    elif damage == "text":
        path.write_text("chosen, rejected")
    elif damage == "missing":
        path.unlink()
    elif damage == "origin":
        fresh = b'{"__metadata__": ["of nobody"]}'
        path.write_bytes(len(fresh).to_bytes(8, "little") + fresh)
    elif damage == "group":
        two = np.array([1, 2])
        sides = {side: np.zeros(SHAPE, np.float32) for side in ("chosen", "rejected")}
        save_file({**sides, "layers": two, "group": two}, path)
    elif damage == "layers":
        sides = {side: np.zeros(SHAPE, np.float32) for side in ("chosen", "rejected")}
        save_file({**sides, "layers": np.array([[1], [2]])}, path)
    else:
        header = json.loads(content[8 : 8 + size])
        header["layers"]["shape"], header["layers"]["data_offsets"][1] = [2], header["layers"]["data_offsets"][0] + 16
        fresh = json.dumps(header).encode().ljust(size)
        path.write_bytes(content[:8] + fresh + content[8 + size :])
    with pytest.raises(DataError, match=r"s\.safetensors"):
        StoredPairs.open(path)


def test_half_precision_states_in_memory_are_taken_as_float32():
    saved = pair_states()
    half = replace(
        saved, chosen_NLD=saved.chosen_NLD.astype(np.float16), rejected_NLD=saved.rejected_NLD.astype(np.float16)
    )
    assert half.take(np.arange(3))[0].dtype == np.float32


def test_what_another_pass_left_unfinished_is_begun_anew(tmp_path):
    path, values = tmp_path / "s.safetensors", states()
    fill(writer(path, made_by="one"), values, rows=range(3))
    assert writer(path, made_by="one").done == {0, 1, 2}
    again = writer(path, made_by="another")  # its groups have other numbers
    assert again.done == set()
    fill(again, values)
    again.close()
    assert np.array_equal(load_states(path).chosen_NLD, values[0])
