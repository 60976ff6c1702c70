import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from inward.errors import DataError
from inward.offline.evaluate.responses import read_responses


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def xstest(kind, label):
    return {"prompt": "p", "response": "r", "type": kind, "label": label}


@pytest.mark.parametrize(
    ("kind", "label", "safe", "behaviour", "harmful"),
    [
        ("homonyms", "1_full_compliance", True, "comply", False),
        ("homonyms", "2_full_refusal", True, "refuse", False),
        ("contrast_homonyms", 1, False, "comply", True),
        ("contrast_homonyms", "2", True, "refuse", True),
    ],
)
def test_only_an_answer_to_a_harmful_prompt_is_unsafe(tmp_path, kind, label, safe, behaviour, harmful):
    [one], left_out = read_responses(write(tmp_path / "x.jsonl", [xstest(kind, label)]))
    assert (one.safe, one.behaviour, one.harmful, left_out) == (safe, behaviour, harmful, 0)


def test_a_label_may_be_a_fraction_as_data_frames_write_it_but_no_other_number(tmp_path):
    [one], _ = read_responses(write(tmp_path / "x.jsonl", [xstest("homonyms", 2.0)]))
    assert one.behaviour == "refuse"
    with pytest.raises(DataError, match="'label' must be 1"):
        read_responses(write(tmp_path / "x.jsonl", [xstest("homonyms", 10)]))


@pytest.mark.parametrize(("safe", "is_safe"), [("true", True), (0.0, False), ("1", True)])
def test_what_is_safe_may_be_written_in_any_way(tmp_path, safe, is_safe):
    [one], _ = read_responses(write(tmp_path / "x.jsonl", [{"prompt": "p", "response": "r", "safe": safe}]))
    assert one.safe is is_safe


def test_a_conversation_is_judged_with_all_of_its_turns(tmp_path):
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]
    row = {"system": "s", "prompt": turns, "response": "r", "safe": True}
    [one], _ = read_responses(write(tmp_path / "x.jsonl", [row]))
    assert one.prompt == [{"role": "system", "content": "s"}, *turns]


def test_partial_refusals_are_left_out_and_counted(tmp_path):
    kept, left_out = read_responses(
        write(tmp_path / "x.jsonl", [xstest("homonyms", "3_partial_refusal"), xstest("homonyms", 1)])
    )
    assert (len(kept), left_out) == (1, 1)


def test_the_plain_form_comes_from_jsonl_and_parquet_alike(tmp_path):
    rows = [{"prompt": "p", "response": "a", "safe": True}, {"prompt": "p", "response": "b", "safe": False}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert read_responses(write(tmp_path / "x.jsonl", rows)) == read_responses(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "response": "r"}, "line 1: needs 'safe'"),
        ({"prompt": "p", "response": 3, "safe": True}, "line 1: 'response' must be text"),
        ({"prompt": "p", "response": "r", "type": "homonyms", "label": "fine"}, "line 1: 'label' must be 1"),
        (xstest(None, 1), "line 1: 'type' is missing"),
        (3, "line 1: must be a JSON object"),
    ],
)
def test_an_error_names_the_line_and_the_field(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        read_responses(write(tmp_path / "x.jsonl", [row]))


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_responses(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match="no rows"):
        read_responses(write(tmp_path / "x.jsonl", []))
    with pytest.raises(DataError, match="line 1: not JSON"):
        (tmp_path / "x.jsonl").write_text("{")
        read_responses(tmp_path / "x.jsonl")
