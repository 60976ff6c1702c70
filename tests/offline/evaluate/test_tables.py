"""What stands in a terminal is what stands in the data."""

from types import SimpleNamespace

import pytest

from inward.offline.evaluate import compare, tables
from inward.offline.evaluate.statistics import Estimate

NAMES = ["[math] algebra", "[/b]", "[bold]b", ":smile: \\[x]"]
FIGURE = Estimate(0.7, 0.6, 0.8)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_parts_and_heads_are_no_markup(capsys, name):
    tables.show(tables.parts(SimpleNamespace(parts={name: (10, {"auc": FIGURE})})))
    assert f"{name} " in capsys.readouterr().out
    difference = compare.Difference("auc", FIGURE, FIGURE, Estimate(0.1, 0.05, 0.2))
    tables.show(compare.table((difference,), ("first", name), f"of {name}"))
    printed = capsys.readouterr().out
    assert f"{name} minus first" in printed and f"of {name}\n" in printed


def test_the_cost_of_a_head_is_told_apart_where_it_was_measured_apart():
    def told(head_ms, with_forward_ms):
        return tables.cost({"cost": {"head_ms": head_ms, "with_forward_ms": with_forward_ms}})

    assert "0.100 ms for the head alone, 3.00 ms with the forward pass" in told(0.1, 3.0)
    assert "for the head alone, forward pass not measured" in told(0.1, None)
    assert told(None, 3.0).startswith("cost of a response: 3.00 ms with the forward pass")


def test_hidden_characters_are_shown_as_escapes(capsys):
    tables.show(tables.parts(SimpleNamespace(parts={"\x1b[31mred": (10, {"auc": FIGURE})})))
    assert "\\x1b[31mred" in capsys.readouterr().out
