import pytest

from inward.errors import DataError
from inward.offline.annotate.decisions import Applied, apply, key_of, read, turned
from inward_client.rows import LAYOUTS, PairReader, recognise


def reader(*rows):
    return recognise(rows)


ROW = {"prompt": "q", "chosen": "good", "rejected": "bad", "id": 7}
LAYOUT_ROWS = [
    ROW,
    {"prompt": "q", "response_0": "bad", "response_1": "good", "safer_response_id": 1, "better_response_id": 0},
    {"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": "1"},
    {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
     "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}]},
    {"instruction": "q", "chosen": "good", "rejected": "bad"},
]  # fmt: skip


@pytest.mark.parametrize("row", LAYOUT_ROWS)
def test_a_row_of_any_layout_is_turned_round_and_back(row):
    read_by = reader(row)
    other = read_by.pair(turned(row, read_by))
    assert (other.chosen, other.rejected, other.prompt) == ("bad", "good", read_by.pair(row).prompt)
    assert turned(turned(row, read_by), read_by) == row


def test_columns_that_were_renamed_are_turned_too():
    row = {"question": "q", "yes": "good", "no": "bad"}
    read_by = PairReader(LAYOUTS["trl"], {"prompt": "question", "chosen": "yes", "rejected": "no"})
    assert turned(row, read_by) == {"question": "q", "yes": "bad", "no": "good"}


def test_an_annotation_is_turned_as_far_as_it_is_known():
    row = {**ROW, "x_margin": 2.0, "x_margin_scaled": 1.0, "x_margin_bin": 0.5, "x_label_probability": 0.9,
           "x_confidence": 0.95, "x_chosen_score": 3.0, "x_rejected_score": 1.0, "x_label_agrees": True}  # fmt: skip
    assert turned(row, reader(ROW), "x_") == {
        "prompt": "q", "chosen": "bad", "rejected": "good", "id": 7, "x_margin": -2.0, "x_margin_scaled": -1.0,
        "x_margin_bin": None, "x_label_probability": pytest.approx(0.1), "x_confidence": None, "x_chosen_score": 1.0,
        "x_rejected_score": 3.0, "x_label_agrees": False,
    }  # fmt: skip
    assert turned({**ROW, "margin": 0.5, "margin_bin": 0.5}, reader(ROW))["margin"] is None


@pytest.mark.parametrize(
    "own", [{"margin": "high"}, {"confidence": "sure"}, {"margin_bin": True}, {"label_agrees": "perhaps"}]
)
def test_a_column_of_the_users_own_stays_whatever_its_name(own):
    row = {**ROW, **own}
    assert turned(row, reader(row)) == {**ROW, "chosen": "bad", "rejected": "good", **own}


def test_exactly_the_decided_rows_change_and_repeated_ones_share_a_decision():
    rows = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(4)]
    rows.append(rows[1])
    read_by = reader(*rows)
    keys = [key_of(read_by.pair(row)) for row in rows]
    told = Applied()
    decided = {keys[0]: "drop", keys[1]: "flip", keys[2]: "right"}
    assert list(apply([*rows, {"prompt": "no pair"}], read_by, decided, "", told)) == [
        turned(rows[1], read_by), rows[2], rows[3], turned(rows[1], read_by), {"prompt": "no pair"},
    ]  # fmt: skip
    assert (told.rows, told.unread, told.drop, told.flip, told.right) == (6, 1, 1, 2, 1)
    assert "2 rows flipped, 1 dropped, 1 right as they are; 5 of 6 rows written" in told.text(decided)


def test_the_other_label_has_another_key():
    read_by = reader(ROW)
    assert key_of(read_by.pair(ROW)) != key_of(read_by.pair(turned(ROW, read_by)))


@pytest.mark.parametrize(
    "content, says",
    [
        ("key\nab\n", "no column decision"),
        ("key,decision\nab,keep\n", "line 2: 'keep' is none of right, flip, drop"),
        ("key,decision\nab,flip\nab,drop\n", "line 2 says flip, line 3 says drop of the same pair"),
        (None, "can't be read as a file of decisions"),
    ],
)
def test_a_file_that_is_none_of_decisions_says_where(tmp_path, content, says):
    path = tmp_path / "decisions.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=says):
        read(path)


def test_a_file_from_a_spreadsheet_is_read(tmp_path):
    path = tmp_path / "decisions.csv"
    path.write_bytes('\ufeffsource,row,key,decision\r\n"a,b",1,AB,Flip\r\nin,2,cd,\r\n'.encode())
    assert dict(read(path)) == {"ab": "flip"}
