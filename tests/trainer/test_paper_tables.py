"""The arithmetic of the tables, on numbers that one can count."""

from types import SimpleNamespace

import numpy as np
import pytest

from inward.offline.states.saved import ListStates
from inward_client.rows import Pair
from inward_trainer.paper import estimates, report, svg
from inward_trainer.paper.cells import Missing
from inward_trainer.paper.ranking import cross_fitted, mixed, ranked, top_is_safe
from inward_trainer.paper.refusals import refuses
from inward_trainer.paper.sizes import QUICK
from inward_trainer.paper.table import Chart, Row, Table
from inward_trainer.paper.tables import probes, srr, topk
from inward_trainer.paper.tables.alignment import _perplexity
from inward_trainer.paper.tables.legend import _bins, _training
from inward_trainer.paper.tables.topk import _unsafe_among


def test_the_best_k_by_a_way_are_those_that_are_counted():
    judge = np.array([[1.0, -1.0, -1.0, 1.0]])  # the second and third are unsafe
    way = np.array([[0.1, 0.9, 0.2, 0.8]])
    assert _unsafe_among(way, judge, 1).tolist() == [1.0]
    assert _unsafe_among(way, judge, 2).tolist() == [0.5]
    assert _unsafe_among(-way, judge, 1).tolist() == [0.0]
    assert _unsafe_among(np.zeros((1, 4)), judge, 1).tolist() == [0.5]  # no order: chance


def test_what_is_made_with_a_seed_has_it_in_its_name():
    def names(seed):
        asked = []

        class Cells:
            def every(self, cells, what):
                asked.extend(cells)
                return dict.fromkeys(cells, Missing("not now"))

        run = SimpleNamespace(seeds=[seed], cells=Cells(), sizes=QUICK, held_out=[], data=None)
        for table in (probes.table, srr.table, topk.table):
            table(run)
        return set(asked)

    assert names(0) & names(1) == {"probes-before", "topk-pairs"}  # which nothing is drawn for


def test_a_table_without_the_figures_of_a_seed_is_not_complete():
    class Cells:
        def every(self, cells, what):
            figures = {column: {"value": 0.5, "low": 0.4, "high": 0.6} for column in topk.RATES}
            made = {"rates": {"our head": figures}}  # as kept by former versions
            return dict.fromkeys(cells, made) | {"topk-before-1": Missing("too late"), "topk-pairs": {}}

    found = topk.table(SimpleNamespace(seeds=[0, 1], cells=Cells(), sizes=QUICK, held_out=[]))
    assert not found.complete
    assert {row.name: row.reason for row in found.rows} == {
        "before alignment: our head": "1 of 2 seeds: too late", "after alignment: our head": "",
    }  # fmt: skip


def test_perplexity_has_the_interval_of_its_prompts_however_many_answer_each():
    def found(answers, seeds=1):
        texts = [SimpleNamespace(prompt=f"prompt {i}") for i in range(12) for _ in range(answers)]
        nats = [float(i) for i in range(12) for _ in range(answers)]
        cells = [{"nats": [value + seed for value in nats]} for seed in range(seeds)]
        return _perplexity(SimpleNamespace(data=SimpleNamespace(plain_texts=texts)), cells)

    assert found(3) == pytest.approx(found(1)) and found(1)["value"] == pytest.approx(np.exp(5.5))
    assert found(1, seeds=2)["spread"] == pytest.approx(np.std(np.exp([5.5, 6.5]), ddof=1))


def test_margins_are_binned_by_quarters_of_those_that_agree():
    margins = np.array([-5.0, 1, 2, 3, 4, 5, 6, 7, 8])
    assert _bins(margins).round(2).tolist() == [0, 0, 0, 0.33, 0.33, 0.67, 0.67, 1, 1]
    assert _bins(np.array([-1.0, -2.0])).tolist() == [0, 0]


def test_ways_of_legend_share_pairs_and_differ_in_margins_or_labels():
    pairs = [Pair(f"p{i}", "good", "bad") for i in range(4)]
    margins = {"heads": {"legend": {"margins": [1, 2, 3, 4]}, "whitened": {"margins": [-1, 2, 3, 4]}}}
    assert _training(pairs, margins, "none", 0) == (pairs, None)
    assert _training(pairs, margins, "dropped", 0) == (pairs[1:], None)
    flipped, _ = _training(pairs, margins, "flipped", 0)
    assert [pair.chosen for pair in flipped] == ["bad", "good", "good", "good"]
    own = _training(pairs, margins, "legend", 0)[1]
    assert own[0] < own[-1] == 1
    shuffled, constant = (_training(pairs, margins, way, 2)[1] for way in ("shuffled", "constant"))
    assert sorted(shuffled) == sorted(own) and shuffled != own
    assert len(set(constant)) == 1 and sum(constant) == pytest.approx(sum(own))


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot provide instructions for this.", True),
        ("As a responsible assistant, no.", True),
        ("I’m unable to do that.", True),
        ("I'm sorry to hear about your hamster. Here's how to bury it.", False),
        ("To kill a Python process, run: kill -9 PID", False),
        ("You can not only do that, " + "x" * 200 + " I'm sorry, but I can't.", False),
    ],
)
def test_refusals_are_told_by_how_they_begin(text, refused):
    assert refuses(text) == refused


def test_seeds_are_averaged_by_prompt_and_their_spread_is_told():
    found = estimates.over_seeds([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert found["value"] == 0.75 and found["spread"] == pytest.approx(np.std([0.5, 1], ddof=1))
    assert found["low"] <= 0.75 <= found["high"]
    assert "spread" not in estimates.over_seeds([[0, 1]])


def test_a_paired_difference_is_narrower_than_two_rates():
    base = np.tile([0.0, 1.0], 50)
    better = np.where(np.arange(100) < 10, 0.0, base)
    found = estimates.paired([better.tolist()], [base.tolist()])
    assert found["value"] == pytest.approx(-0.05) and found["high"] - found["low"] < 0.1


def test_equal_scores_are_half_a_pair():
    assert estimates.pair_accuracy([1, 2, 3], [1, 1, 4], [0, 1, 2])["value"] == pytest.approx(0.5)


def test_rankers_are_judged_on_prompts_that_they_have_not_seen():
    rng = np.random.default_rng(0)
    G, n, D = 20, 4, 64
    safe = np.tile([True, False, False, True], G)
    candidates = rng.normal(size=(G * n, 1, D)).astype(np.float32)
    candidates += np.where(safe, 1, -1)[:, None, None]
    lists = ListStates(
        rng.normal(size=(G, 1, D)).astype(np.float32), candidates, np.repeat(np.arange(G), n), safe, (1,), np.arange(G)
    )
    assert mixed(lists).tolist() == list(range(G))
    folds = cross_fitted(lists, "linear", 1, epochs=40, seed=0)
    assert sorted(g for fold in folds for g in fold.test_G) == list(range(G))
    assert top_is_safe(lists, ranked(folds, lists, 1)).mean() > 0.9
    assert top_is_safe(lists, -candidates[:, 0].sum(axis=1)).mean() < 0.1


def test_a_report_tells_figures_intervals_spreads_and_reasons():
    figure = {"value": 0.25, "low": 0.2, "high": 0.3, "spread": 0.01}
    rows = [Row("ours", {"rate": figure, "per": "answer"}), Row("theirs", {}, "too late")]
    table = Table("t", "A table", ["rate", "per"], rows, ["a note <b>"], published=[["rate", "0.9", "a paper", "7 B"]])
    assert not table.complete and Table.from_json(table.to_json()) == table
    text = report.markdown({}, [("t", table), ("u", "not made yet")])
    assert "| ours | 0.250 ±0.010 [0.200, 0.300] | answer |" in text
    assert "| theirs (too late) | – | – |" in text and "No figures: not made yet" in text
    page = report.page({}, [("t", table)])
    assert "<small>[0.200, 0.300]</small>" in page and "a note &lt;b&gt;" in page and "Published, not ours" in page


def test_a_figure_has_a_line_for_each_series_and_nothing_without_points():
    lines = svg.draw(Chart("a & b", "x", "y", {"one": [(0, 1), (1, 2)], "two": [(0, 0), (1, 0)]}))
    assert lines.count("<polyline") == 2 and "a &amp; b" in lines
    points = svg.draw(Chart("p", "x", "y", {"one": [(0, 1)]}, "scatter"))
    assert "<polyline" not in points and points.count("<circle") == 1
    assert svg.draw(Chart("none", "x", "y", {})) == ""
