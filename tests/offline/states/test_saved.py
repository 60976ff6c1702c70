from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from inward.errors import DataError
from inward.offline.states.saved import (
    ListStates,
    Origin,
    PairStates,
    load_list_states,
    load_states,
    near_duplicates,
    save_states,
)
from support.small_heads import pair_states

REAL = Path(__file__).parents[2] / "../shared/data/llama2_7b_states.safetensors"
RNG = np.random.default_rng(0)


def list_states():
    return ListStates(
        RNG.normal(size=(3, 2, 4)).astype(np.float32), RNG.normal(size=(6, 2, 4)).astype(np.float32),
        np.array([0, 0, 1, 1, 1, 2]), np.array([True, False, True, False, False, True]), (1, 3), np.array([7, 8, 7]),
        Origin("eos", template="t", data_hash="h"),
    )  # fmt: skip


def same(a, b):
    fields = type(a).__dataclass_fields__
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in fields)


@pytest.mark.parametrize("states", [pair_states(n=5), list_states()])
def test_states_come_back_as_they_were_saved(tmp_path, states):
    save_states(states, tmp_path / "deep" / "states.safetensors")
    assert same(load_states(tmp_path / "deep" / "states.safetensors"), states)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["states.safetensors"]


def test_the_other_kind_of_states_is_refused(tmp_path):
    save_states(pair_states(n=5), tmp_path / "pairs")
    save_states(list_states(), tmp_path / "lists")
    assert isinstance(load_states(tmp_path / "pairs"), PairStates)
    assert isinstance(load_list_states(tmp_path / "lists"), ListStates)
    with pytest.raises(DataError, match=r"lists .prompt, candidates. are needed"):
        load_list_states(tmp_path / "pairs")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_file_with_nothing_but_the_states_is_enough(tmp_path, dtype):
    chosen = torch.from_numpy(RNG.normal(size=(4, 2, 64))).to(dtype)
    chosen[3] = chosen[0]
    save_torch({"chosen": chosen, "rejected": -chosen, "layers": torch.tensor([2, 4])}, tmp_path / "states")
    states = load_states(tmp_path / "states")
    assert (states.layers, states.length_difference_N) == ((2, 4), None)
    assert states.origin == Origin(data_hash=states.origin.data_hash)
    assert states.chosen_NLD.dtype == np.float32
    assert np.array_equal(states.chosen_NLD, chosen.float().numpy())
    assert states.groups_N[0] == states.groups_N[3]
    assert len(set(states.groups_N.tolist())) == 3
    assert states.origin.data_hash.startswith("sha256:")


def test_near_duplicates_are_linked_through_others_and_do_not_depend_on_the_order():
    axes = np.eye(16, dtype=np.float32)
    step = axes[1] * 0.03
    shared = 100 * axes[15]  # as in deep layers: without centring every row would be a near-duplicate of every other
    rows = np.stack([axes[0], axes[0] + step, axes[0] + 2 * step, *axes[2:15]]) + shared
    groups = near_duplicates(rows)
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups.tolist())) == len(rows) - 2
    order = [2, 3, 0, 1, *range(4, len(rows))][::-1]
    assert near_duplicates(rows[order]).tolist() == groups[order].tolist()


def test_a_row_of_zeros_is_a_group_by_itself():
    groups = near_duplicates(np.concatenate([np.zeros((1, 4), np.float32), np.eye(4, dtype=np.float32)]))
    assert len(set(groups.tolist())) == 5


def broken(**changes):
    tensors = {"chosen": np.ones((3, 2, 4)), "rejected": np.zeros((3, 2, 4)), "layers": np.array([1, 2])}
    return {name: t for name, t in {**tensors, **changes}.items() if t is not None}


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (broken(layers=None), "lacks the tensor 'layers'"),
        (broken(rejected=None), "lacks the tensor 'rejected'"),
        (broken(chosen=None), "lacks the tensor 'prompt'"),
        (broken(rejected=np.zeros((2, 2, 4))), r"rejected has shape \[2, 2, 4\], but \[3, 2, 4\]"),
        (broken(layers=np.array([1, 2, 3])), "chosen has shape"),
        (broken(chosen=np.ones((3, 8))), "must be"),
        (broken(group=np.array([1, 2])), "group has shape"),
        (broken(group=np.array([1, 2, np.nan])), "group has NaN"),
        (broken(layers=np.array([[1, 2]])), r"layers must be a list .* shape \[1, 2\]"),
        (broken(chosen=np.full((3, 2, 4), np.nan)), "chosen has NaN or infinite entries, the first in row 0"),
    ],
)
def test_files_that_cannot_be_used_say_which_tensor_and_why(tmp_path, tensors, problem):
    save_file(tensors, tmp_path / "states")
    with pytest.raises(DataError, match=problem):
        load_states(tmp_path / "states")


def test_damaged_and_missing_files_are_named(tmp_path):
    (tmp_path / "cut").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    for name in ("cut", "none"):
        with pytest.raises(DataError, match=name):
            load_states(tmp_path / name)


def test_a_list_whose_group_is_not_a_prompt_is_refused(tmp_path):
    states = list_states()
    with pytest.raises(DataError, match="from 0 to 2"):
        ListStates(
            states.prompt_GLD[:2],
            states.candidates_MLD,
            states.group_M,
            states.safe_M,
            states.layers,
            states.groups_G[:2],
        )


def test_some_of_the_lists_keep_their_own_candidates():
    states = list_states()
    some = states.lists(np.array([2, 0]))
    assert some.group_M.tolist() == [0, 1, 1]
    assert np.array_equal(some.candidates_MLD, states.candidates_MLD[[5, 0, 1]])
    assert np.array_equal(some.prompt_GLD, states.prompt_GLD[[2, 0]])


def test_a_layer_is_found_by_its_number():
    states = pair_states(n=5, layers=(1, 5, 9))
    assert np.array_equal(states.at(5)[0], states.chosen_NLD[:, 1])
    with pytest.raises(DataError, match=r"layer 2 is not among .*1, 5, 9"):
        states.at(2)


@pytest.mark.skipif(not REAL.exists(), reason="the Llama-2 states are not part of the repository")
def test_real_states_of_strangers_are_read_and_their_near_duplicates_grouped():
    states = load_states(REAL)
    assert (states.chosen_NLD.shape, states.layers[-1]) == ((201, 16, 4096), 32)
    assert 180 < len(np.unique(states.groups_N)) < 201
