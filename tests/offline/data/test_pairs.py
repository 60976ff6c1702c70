import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from inward.errors import DataError
from inward.offline.data.pairs import (
    Pair,
    Response,
    check_prompts,
    data_hash,
    grouped_folds,
    grouped_split,
    has_refusals,
    prompt_groups,
    read_calibration,
    read_lists,
    read_pairs,
    read_texts,
)

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
ROWS = [
    {"prompt": "a", "chosen": "good", "rejected": "bad", "extra": 1},
    {"prompt": CHAT, "chosen": "", "rejected": "b"},
]


def jsonl(folder, *lines):
    path = folder / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_pairs_are_read_with_strings_or_messages_and_extra_columns_are_ignored(tmp_path):
    pairs = read_pairs(jsonl(tmp_path, ROWS[0], "", ROWS[1]))
    assert pairs == [Pair("a", "good", "bad"), Pair(CHAT, "", "b")]


def test_answers_may_be_single_messages_as_in_conversational_preference_data(tmp_path):
    row = {
        "prompt": CHAT,
        "chosen": [{"role": "assistant", "content": "x"}],
        "rejected": [{"role": "assistant", "content": "y"}],
    }
    assert read_pairs(jsonl(tmp_path, row)) == [Pair(CHAT, "x", "y")]


def test_parquet_gives_the_same_rows_and_hash_as_jsonl(tmp_path):
    rows = [{"prompt": CHAT, "chosen": "x", "rejected": "y"}, {"prompt": CHAT[1:], "chosen": "z", "rejected": "é"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    pairs = read_pairs(tmp_path / "rows.parquet")
    assert pairs == read_pairs(jsonl(tmp_path, *rows))
    assert data_hash(pairs) == data_hash(read_pairs(jsonl(tmp_path, *[{**row, "note": "n"} for row in rows])))
    assert data_hash(pairs) != data_hash(pairs[::-1])


def test_a_broken_first_row_does_not_hide_what_the_rows_are(tmp_path):
    rows = jsonl(tmp_path, '{"prompt": "a", "harm', {"prompt": "a", "harmful": "bad", "refusal": "no"})
    assert has_refusals(rows)
    assert read_texts(rows) == [("a", ("no", "bad"))]
    assert not has_refusals(jsonl(tmp_path, "{", ROWS[0]))


def test_lists_and_calibration_rows_are_read(tmp_path):
    (one,) = read_lists(
        jsonl(
            tmp_path, {"prompt": "p", "responses": [{"text": "t", "safe": True, "model": "m"}, {"text": "", "safe": 0}]}
        )
    )
    assert one.responses == (Response("t", True), Response("", False))
    (row,) = read_calibration(jsonl(tmp_path, {"prompt": "p", "harmful": "h", "refusal": "r"}))
    assert row.pair == Pair("p", chosen="r", rejected="h")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "a", "chosen": "x"}, "rejected"),
        ({"prompt": "a", "chosen": None, "rejected": "y"}, "chosen"),
        ({"prompt": 3, "chosen": "x", "rejected": "y"}, "prompt"),
        ({"prompt": [], "chosen": "x", "rejected": "y"}, "prompt"),
        ({"prompt": [{"role": "user"}], "chosen": "x", "rejected": "y"}, "prompt"),
        ({"prompt": "a", "chosen": ["x"], "rejected": "y"}, "chosen"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, row, field):
    path = jsonl(tmp_path, "", row)
    with pytest.raises(DataError) as error:
        read_pairs(path)
    assert f"{path.name}, line 2: '{field}'" in error.value.message or "no layout of preference pairs" in str(
        error.value
    )
    assert error.value.param in (field, None)


def test_rows_that_can_not_be_read_are_left_out_with_their_reason(tmp_path, capsys):
    path = jsonl(tmp_path, ROWS[0], "", {"prompt": "a", "chosen": 3, "rejected": "y"}, "{", ROWS[1])
    assert [pair.chosen for pair in read_pairs(path)] == ["good", ""]
    told = capsys.readouterr().err
    assert told.startswith("note: 2 of 4 rows are left out")
    assert "'chosen' must be text, or chat messages (first: rows.jsonl, line 3)" in told


@pytest.mark.parametrize("line", ["{", "3", "\x00"])
def test_lines_that_are_no_json_objects_are_named(tmp_path, line):
    with pytest.raises(DataError, match="line 1"):
        read_pairs(jsonl(tmp_path, " " + line))


@pytest.mark.parametrize(
    "responses", [[], "text", [{"safe": True}], [{"text": "t"}], [{"text": "t", "safe": "yes"}], ["t"]]
)
def test_bad_response_lists_are_named(tmp_path, responses):
    with pytest.raises(DataError, match="line 1: 'responses"):
        read_lists(jsonl(tmp_path, {"prompt": "p", "responses": responses}))


def test_missing_empty_and_broken_files_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no rows"):
        read_pairs(jsonl(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="can't be read as parquet"):
        read_pairs(tmp_path / "x.parquet")


GROUPS = st.lists(st.integers(0, 12), min_size=1, max_size=60).filter(lambda g: len(set(g)) >= 3)


@given(GROUPS, st.integers(0, 99))
def test_a_split_keeps_prompts_together_loses_nothing_and_leaves_no_part_empty(groups, seed):
    parts = grouped_split(groups, [0.7, 0.2, 0.1], seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(groups)))
    labels = [{groups[i] for i in part} for part in parts]
    assert all(labels)
    assert sum(map(len, labels)) == len(set().union(*labels))


@given(GROUPS, st.integers(0, 99), st.randoms(use_true_random=False))
def test_a_split_does_not_depend_on_the_order_of_the_rows(groups, seed, random):
    order = list(range(len(groups)))
    random.shuffle(order)
    for part, shuffled in zip(
        grouped_split(groups, [3, 1], seed), grouped_split([groups[i] for i in order], [3, 1], seed), strict=True
    ):
        assert {groups[i] for i in part} == {groups[order[i]] for i in shuffled}


def test_parts_have_about_the_size_asked_for_and_depend_on_the_seed():
    groups = np.arange(1000) // 2
    train, rest = grouped_split(groups, [0.8, 0.2], 0)
    assert abs(len(train) - 800) <= 4
    assert set(rest.tolist()) != set(grouped_split(groups, [0.8, 0.2], 1)[1].tolist())


def test_folds_hold_out_every_row_once_and_never_a_prompt_on_both_sides():
    groups = prompt_groups([f"prompt {i // 3}" for i in range(60)])
    folds = grouped_folds(groups, 5, 0)
    assert sorted(np.concatenate([held for _, held in folds]).tolist()) == list(range(60))
    assert all(not set(groups[train]) & set(groups[held]) for train, held in folds)
    assert all(len(train) + len(held) == 60 for train, held in folds)


def test_too_few_prompts_to_split_is_an_error():
    with pytest.raises(DataError, match="2 different prompts"):
        grouped_folds([1, 1, 2], 3, 0)


def test_one_prompt_makes_no_folds():
    with pytest.raises(DataError, match="1 different prompts"):
        grouped_folds([4, 4, 4], 1, 0)


def test_too_few_prompts_are_counted():
    check_prompts([1, 1, 2], 2)
    with pytest.raises(DataError, match=r"^2 different prompts of these, and 3 at least are needed"):
        check_prompts([1, 1, 2], 3, "of these")


def test_the_group_of_a_prompt_depends_on_its_content_alone():
    a, b, again, chat, chat_again = prompt_groups(["a", "b", "a", CHAT, [dict(m) for m in CHAT]])
    assert a == again != b
    assert chat == chat_again != a
