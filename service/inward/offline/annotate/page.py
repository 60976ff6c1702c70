"""The pairs that are worth looking at, as one HTML file that needs nothing else: filters, keys to decide, and a file
of decisions out. It holds the pairs that were asked for, however many were annotated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from inward.offline.annotate.cells import plain
from inward.offline.annotate.decisions import key_of
from inward.offline.annotate.quality import Quality
from inward.offline.annotate.scorer import Annotator, TokenScores
from inward.offline.annotate.summary import Picked, Summary, binned
from inward.types import Doubles, Indices
from inward_client.rows import as_turns, printable

BARS = 40
WIDTH, HEIGHT, AXIS = 800, 150, 22
"""Of the histogram: its bars, and what stands below them."""
TICKS = 6
LONGEST_VALUE = 120
"""Characters of another column's value that are shown."""
HERE = Path(__file__).parent
CONTROLS = """
<div class="bar">
<label>text <input type="search" id="text" data-filter="text" placeholder="in prompt or answers"></label>
<label>margin <input type="number" step="any" data-filter="least margin" aria-label="least margin"> to
<input type="number" step="any" data-filter="most margin" aria-label="most margin"></label>
<label>probability <input type="number" step="any" data-filter="least probability" aria-label="least probability"> to
<input type="number" step="any" data-filter="most probability" aria-label="most probability"></label>
<label>longer by <input type="number" data-filter="least length" aria-label="least length difference"> to
<input type="number" data-filter="most length" aria-label="most length difference"></label>
<label>head <select data-filter="agrees" aria-label="agrees"><option value="">agrees or not</option>
<option value="false">contradicts</option><option value="true">agrees</option>
<option value="null">has no verdict</option></select></label>
<label>column <select id="column"><option value="">any</option></select>
<input data-filter="value" size="10" aria-label="value of the column"></label>
<label>decided <select data-filter="decision" aria-label="decided"><option value="">or not</option>
<option>undecided</option><option>decided</option><option>right</option><option>flip</option><option>drop</option>
</select></label>
<label>sort <select id="sort"><option value="margin up">margin, smallest first</option>
<option value="margin down">margin, largest first</option>
<option value="probability up">probability, smallest first</option>
<option value="length up">shortest chosen first</option><option value="length down">longest chosen first</option>
<option value="place up">order of the file</option></select></label>
<div><span id="count"></span> · <kbd>j</kbd> <kbd>k</kbd> next, back · <kbd>r</kbd> right · <kbd>f</kbd> flip ·
<kbd>d</kbd> drop · <kbd>u</kbd> undo <button id="colour" aria-pressed="false">colour tokens (c)</button>
<button id="export">decisions.csv</button></div>
</div>
<div id="list"></div>
<button id="more">more</button>
"""


def page(
    name: str,
    annotator: Annotator,
    summary: Summary,
    pairs: Sequence[Picked],
    quality: Quality | None = None,
    tokens: Sequence[TokenScores | None] = (),
) -> str:
    """The whole file.

    Args:
        pairs: those to show.
        tokens: of each of them, where they were asked for.
    """
    head = annotator.head
    rows = [_row(n, one, tokens[n] if n < len(tokens) else None) for n, one in enumerate(pairs)]
    columns = sorted({column for row in rows for column in row["rest"]})
    # the same pairs of the same file have the same decisions when the page is opened again
    job = "inward " + hashlib.sha256(json.dumps([name, [row["key"] for row in rows]]).encode()).hexdigest()[:16]
    told = "\n".join(quality.text()) if quality else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(name)}, annotated</title><style>{_file("page.css")}</style></head><body>
<h1>{escape(name)}</h1>
<p>{summary.annotated:,} pairs annotated by head {escape(head["name"])} ({escape(head["kind"])},
version {head["version"]}) on {escape(annotator.model)};
{summary.flipped:,} labels are contradicted by it; {summary.rejected:,} rows were left out.</p>
<pre>{escape(printable(told))}</pre>
<h2>Margins</h2>
<p>Score of the chosen answer minus score of the rejected one. What stands left of zero (in orange) contradicts its
label. The outermost bars hold what lies beyond them.</p>
{_histogram(summary)}
<h2>{len(pairs):,} pairs</h2>
<p>A head can be wrong, too: read before you flip. Decisions are kept in this browser until you save them;
<code>inward annotate --apply decisions.csv IN OUT</code> writes them into the set.</p>
{CONTROLS}
<script type="application/json" id="data">{_json({"job": job, "rows": rows, "columns": columns})}</script>
<script>{_file("page.js")}</script></body></html>
"""


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, zero among them where it is in between."""
    rough = (high - low) / TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _row(place: int, one: Picked, tokens: TokenScores | None) -> dict[str, Any]:
    columns = one.columns
    row = {
        "place": place, "source": one.source, "row": one.row, "key": key_of(one.pair),
        "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in as_turns(one.pair.prompt)],
        "chosen": one.pair.chosen, "rejected": one.pair.rejected, "margin": columns["margin"],
        "probability": columns.get("label_probability"), "agrees": columns["label_agrees"],
        "chosen_score": columns["chosen_score"], "rejected_score": columns["rejected_score"],
        "rest": {str(name): _short(value) for name, value in one.rest.items() if value is not None},
    }  # fmt: skip
    if tokens is not None:
        row |= {"chosen_tokens": tokens.chosen, "rejected_tokens": tokens.rejected}
    return row


def _short(value: Any) -> Any:
    value = plain(value)
    if isinstance(value, int | float | bool):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def _json(value: Any) -> str:
    """That can stand in a script element: no text in it ends that, and none is half of a surrogate pair."""
    return json.dumps(plain(value), allow_nan=False).replace("<", "\\u003c")


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _histogram(summary: Summary) -> str:
    if not summary.annotated:
        return ""
    counts, edges = binned(summary.margin_N, BARS)
    drawn = "".join([*_bars(counts, edges), *_axis(counts, edges)])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT + AXIS}" role="img" aria-label="histogram of margins">{drawn}</svg>'


def _bars(counts: Indices, edges: Doubles) -> Iterator[str]:
    width = WIDTH / BARS
    for n, (count, left, right) in enumerate(zip(counts, edges, edges[1:], strict=False)):
        height = (HEIGHT - 15) * count / counts.max()
        colour = "#d1742a" if right <= 0 else "#4a7fb0"
        yield (
            f'<rect x="{n * width + 1:.1f}" y="{HEIGHT - height:.1f}" width="{width - 2:.1f}" height="{height:.1f}" '
            f'fill="{colour}">'
            f"<title>{left:.3g} to {right:.3g}: {count:,}</title></rect>"
        )


def _axis(counts: Indices, edges: Doubles) -> Iterator[str]:
    low, high = float(edges[0]), float(edges[-1])
    yield f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}" stroke="#8a8d93"/>'
    yield f'<text x="2" y="11">{counts.max():,} pairs</text>'
    for value in ticks(low, high):
        x = WIDTH * (value - low) / (high - low)
        if value == 0:
            yield f'<line class="zero" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT + 5}" stroke="#1d1d1f"/>'
        anchor = "start" if x < 15 else "end" if x > WIDTH - 15 else "middle"
        yield f'<text x="{x:.1f}" y="{HEIGHT + 17}" text-anchor="{anchor}">{value:.4g}</text>'
