"""A judgement as a table in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.console import Group as Lines
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from inward.offline.evaluate.judge import REFERENCES, Judgement
from inward.offline.evaluate.metrics import NAMES, Metrics
from inward_client.rows import printable

PARTS = ("pair_accuracy", "auc", "macro_f1", "calibration_error", "top1_safe_rate")
"""Metrics of the parts of the rows."""
PARAGRAPH = 100
"""Characters of its lines: narrower than the table, which decides how wide everything is."""


def methods(judgement: Judgement, head: str) -> Iterator[tuple[str, Metrics]]:
    """The head and everything it is compared with, by the names that a reader sees."""
    yield head, judgement.metrics
    for baseline, metrics in judgement.baselines.values():
        yield baseline.about, metrics
    for name, metrics in judgement.references.items():
        yield REFERENCES[name], metrics


def shown(judgement: Judgement) -> list[str]:
    """The metrics that some method has."""
    every = [metrics for _, metrics in methods(judgement, "")]
    return [name for name in NAMES if name != "label_agreement" and any(m.get(name) for m in every)]


def table(judgement: Judgement, report: Mapping[str, Any]) -> RenderableType:
    """What ``inward evaluate`` prints; ``report`` is the whole of ``--json``."""
    columns = shown(judgement)
    main = Table("", *(NAMES[name] for name in columns), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    head = Text.assemble((printable(report["head"]["name"]), "bold"), f" ({report['head']['kind']})")
    for name, metrics in methods(judgement, ""):
        main.add_row(name or head, *(str(metrics.get(column) or "") for column in columns))
    lines: list[RenderableType] = [summary(report), "", main, "", textwrap.fill(report["verdict"], PARAGRAPH)]
    if judgement.strategies:
        by = ", ".join(
            f"{one.name}{f' ({one.layer})' if one.layer is not None else ''} {one.estimate.value:.3f}"
            for one in judgement.strategies
        )
        lines += ["", f"by strategy ({NAMES[report['strategies']['metric']]}): {by}"]
    if judgement.guard:
        lines += ["", guard(judgement)]
    if judgement.parts:
        lines += ["", parts(judgement)]
    if report["over_refusal"]:
        lines += ["", report["over_refusal"]["sentence"]]
    return Lines(*lines, "", cost(report), *(f"note: {note}" for note in report["notes"]))


def guard(judgement: Judgement) -> RenderableType:
    """The head as a guard: what it catches where so much of what is harmless may be flagged."""
    refusals = any(one.false_refusals for one in judgement.guard)
    columns = ["wanted false positives", "caught (TPR)", "false positives"]
    columns += ["XSTest false refusals"] if refusals else []
    found = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for one in judgement.guard:
        cells = [one.true_positives, one.false_positives, *([one.false_refusals] if refusals else [])]
        found.add_row(f"{one.rate:.0%}", *(str(cell or "") for cell in cells))
    return found


def parts(judgement: Judgement) -> RenderableType:
    """Each part's own figures."""
    names = [n for n in PARTS if any(metrics.get(n) for _, metrics in judgement.parts.values())]
    found = Table("part", "responses", *(NAMES[name] for name in names), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, (n, metrics) in judgement.parts.items():
        found.add_row(printable(name), str(n), *(str(metrics.get(one) or "") for one in names))
    return found


def show(content: RenderableType) -> None:
    """Prints it so wide that no column is cut off, whatever the terminal; a narrow one wraps or scrolls it. Text is
    shown as it is: names come from files, and ``[b]`` in one of them is no markup.
    """
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    console = Console(**plain)
    wide = Console(width=10_000, **plain)
    needed = Measurement.get(wide, wide.options, content).maximum
    if not console.is_terminal or needed > console.width:
        console = Console(width=max(needed, 80), soft_wrap=True, **plain)
    console.print(content)


def summary(report: Mapping[str, Any]) -> str:
    """What was judged, in a line."""
    given = report["input"]
    counts = [f"{given['responses']} responses to {given['prompts']} prompts", f"{given['comparisons']} comparisons"]
    if given["mixed_lists"]:
        counts.append(f"{given['mixed_lists']} lists with both kinds")
    how = f"cross-validated over {given['folds']} folds of prompts" if given["cross_validated"] else "as it is"
    return f"{printable(given['file'])}: {', '.join(counts)}; head {how}; 95 % intervals over prompts"


def cost(report: Mapping[str, Any]) -> str:
    """The head alone, where it was measured apart, and with the forward pass that it reads."""
    alone, whole = report["cost"]["head_ms"], report["cost"]["with_forward_ms"]
    told = [] if alone is None else [f"{alone:.3f} ms for the head alone"]
    told.append(
        "forward pass not measured (states were given)" if whole is None else f"{whole:.2f} ms with the forward pass"
    )
    return f"cost of a response: {', '.join(told)}, generation not part of this"
