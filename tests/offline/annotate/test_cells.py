import datetime
import decimal
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inward.offline.annotate.cells import to_csv, to_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(VALUES)
def test_everything_becomes_one_line_of_strict_json_in_utf_8(value):
    line = to_json(value)
    line.encode()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda constant: pytest.fail(constant))


def test_bytes_are_base64_and_what_json_lacks_is_its_text():
    row = {"b": b"\xff", "d": decimal.Decimal("1.50"), "t": datetime.date(2026, 1, 2), 3: (1,)}
    assert json.loads(to_json(row)) == {"b": "/w==", "d": "1.50", "t": "2026-01-02", "3": [1]}


def test_only_what_is_nested_is_json_in_a_csv_cell():
    assert (to_csv("a"), to_csv(1.5), to_csv(None), to_csv(float("nan"))) == ("a", 1.5, None, None)
    assert to_csv([1, {"a": "ö"}]) == '[1, {"a": "ö"}]'
