"""A judgement as one HTML file that needs nothing else: pictures are inside it."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from inward.errors import SetupError
from inward.files import whole
from inward.offline.evaluate import heatmap, plots
from inward.offline.evaluate.judge import Judgement
from inward.offline.evaluate.metrics import MEANINGS, NAMES
from inward.offline.evaluate.tables import cost, methods, shown, summary


class Section(NamedTuple):
    """A picture, what it shows, and why it may be missing."""

    id: str
    title: str
    picture: plots.Picture
    says: str
    missing: str


SECTIONS = (
    Section(
        "layers",
        "Probe accuracy per layer",
        plots.layers,
        "Each point is a linear probe of one layer, fitted on other prompts than it is judged on. Where the line is "
        "high, safety can be read from that layer by a single direction. The dashed line is the head; the grey line "
        "at 0.5 is chance.",
        "One layer only, or neither baselines nor a head with a probe a layer: there is nothing to compare by layer.",
    ),
    Section(
        "pca",
        "Safe and unsafe states",
        plots.pca,
        "States of the responses on their first two principal components. The components do not know the labels: "
        "where the colours part, safety is one of the largest differences between responses at that layer. Overlap "
        "here does not rule out a direction further down that separates them.",
        "No states.",
    ),
    Section(
        "rewards",
        "Scores of better and worse responses",
        plots.rewards,
        "The spread of the head's scores; upright lines are medians. Across prompts the two may overlap although most "
        "responses are ranked right within their prompt: pair accuracy compares within a prompt, AUC across all. The "
        "outermost bars hold what lies beyond them.",
        "The method has no score for a single response.",
    ),
    Section(
        "thresholds",
        "What a threshold catches, and what it costs",
        plots.thresholds,
        "For every threshold: the share of unsafe responses below it against the share of safe ones below it, so a "
        "guard wants to be high on the left. Dots: thresholds fixed at 1 % and 5 % false positives on other "
        "responses. The grey line is chance.",
        "The method has no score for a single response.",
    ),
    Section(
        "reliability",
        "Reliability of the probability",
        plots.reliability,
        "Responses in bins of the stated probability; a larger dot is more responses. On the diagonal, of responses "
        "called 70 % safe 70 % are. Below it the head is too sure of safety, above it not sure enough.",
        "This head states no probability of a single response.",
    ),
    Section(
        "strategies",
        "One layer alone, or all of them",
        plots.strategies,
        "What the head reaches beside single layers: best and worst are picked with hindsight on these very "
        "responses, so they are bounds and not methods; random is the mean over layers.",
        "One layer only, or no layer scores.",
    ),
    Section(
        "lengths",
        "Margin against length difference",
        plots.margins,
        "Each point is a comparison. A reward that pays for length leans along a diagonal; the rank correlation is in "
        "the table, beside the accuracy on the quarter of the comparisons whose lengths differ least.",
        "The lengths of these responses are not known.",
    ),
)
NO_REFUSALS = "The input has no refusals of harmless prompts to compare with helpful answers."
CSS = """
body{font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:#1d1d1f}
body{max-width:62rem;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.5rem;margin:0 0 .2rem}
h2{font-size:1.08rem;margin:2.4rem 0 .3rem}
p{margin:.3rem 0 .8rem;max-width:46rem;color:#3c3f45}
p.said{border-left:3px solid #d1742a;padding-left:.9rem}
img{max-width:100%;height:auto;display:block;margin:.6rem 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;margin:.8rem 0}
th,td{text-align:right;padding:.28rem .8rem;border-bottom:1px solid #e6e7ea;white-space:nowrap}
th{font-weight:600;color:#5b5f67}
th:first-child,td:first-child{text-align:left;padding-left:.4rem}
tr.head td{font-weight:600;background:#f4f7fa}
td small{color:#8a8f98;font-weight:400}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .9rem;font-size:13px;color:#3c3f45}
dt{font-weight:600} dd{margin:0}
p.tokens{max-width:none;white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px}
"""


def page(judgement: Judgement, report: Mapping[str, Any]) -> str:
    """The whole file; ``report`` is what ``--json`` prints."""
    head = report["head"]
    title = f"{head['name']} ({head['kind']}, version {head['version']}) on {report['input']['file']}"
    layers = ", ".join(map(str, head["layers"]))
    body = "\n".join(_sections(judgement))
    said = report["over_refusal"]["sentence"] if report["over_refusal"] else NO_REFUSALS
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head><body>
<h1>{escape(title)}</h1>
<p>{escape(summary(report))}. Backbone {escape(head["backbone"])}, position {escape(head["position"])},
layers {escape(layers)}.</p>
<section id="verdict"><h2>Verdict</h2><p>{escape(report["verdict"])}</p></section>
<section id="metrics"><h2>Metrics</h2>
<p>Value and 95 % interval, resampled by prompt. Baselines that need fitting are fitted by
{report["input"]["folds"]}-fold cross-validation over the prompts of this very file, so they know these data better than
a head that was fitted elsewhere.</p>
<div class="scroll">{_table(judgement, f"{head['name']} ({head['kind']})")}</div>
{_words(judgement)}
<p>{escape(cost(report))}.</p>{"".join(f"<p>Note: {escape(note)}</p>" for note in report["notes"])}</section>
<section id="over-refusal"><h2>Over-refusal</h2><p class="said">{escape(said)}</p></section>
{body}
<section id="tokens"><h2>Token by token</h2>{heatmap.section(judgement.tokens)}</section>
</body></html>
"""


def write(path: Path, judgement: Judgement, report: Mapping[str, Any]) -> None:
    """Writes the page.

    Raises:
        SetupError: it can't be written.
    """
    content = page(judgement, report)
    try:
        with whole(path) as file:
            file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise SetupError(f"can't write the page to {path}: {error.strerror or error}") from error


def _sections(judgement: Judgement) -> Iterator[str]:
    for section in SECTIONS:
        drawn = plots.draw(section.picture, judgement)
        content = f"<p>{escape(section.missing)}</p>"
        if drawn is not None:
            data = base64.b64encode(drawn.encode()).decode()
            picture = f'<img alt="{escape(section.title)}" src="data:image/svg+xml;base64,{data}">'
            content = f"{picture}<p>{escape(section.says)}</p>"
        yield f'<section id="{section.id}"><h2>{escape(section.title)}</h2>{content}</section>'


def _table(judgement: Judgement, head: str) -> str:
    columns = shown(judgement)
    rows = ["<tr><th></th>" + "".join(f"<th>{escape(NAMES[name])}</th>" for name in columns) + "</tr>"]
    for number, (name, metrics) in enumerate(methods(judgement, head)):
        cells = []
        for column in columns:
            one = metrics.get(column)
            cells.append(
                f"<td>{one.value:.3f} <small>{one.low:.2f} to {one.high:.2f}</small></td>" if one else "<td></td>"
            )
        rows.append(f"<tr{' class=head' if number == 0 else ''}><td>{escape(name)}</td>{''.join(cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _words(judgement: Judgement) -> str:
    """What the columns of the table say."""
    said = (f"<dt>{escape(NAMES[name])}</dt><dd>{escape(MEANINGS[name])}</dd>" for name in shown(judgement))
    return f"<dl>{''.join(said)}</dl>"
