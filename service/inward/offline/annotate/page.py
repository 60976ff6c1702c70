"""The pairs that are worth looking at, as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from inward.offline.annotate.scorer import Annotator
from inward.offline.annotate.summary import Summary, Suspicious, binned
from inward_client.rows import as_turns

BARS = 40
CSS = """
body{font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:#1d1d1f;
max-width:72rem;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.5rem;margin:0 0 .2rem}h2{font-size:1.08rem;margin:2.2rem 0 .4rem}
p{color:#3c3f45;max-width:48rem}
svg{width:100%;height:9rem;display:block}
input{font:inherit;padding:.35rem .6rem;width:22rem;max-width:100%;border:1px solid #c9ccd2;border-radius:.35rem}
article{border-top:1px solid #e1e3e7;padding:.9rem 0}
.facts{color:#5b5f67;font-size:13px;font-variant-numeric:tabular-nums}
.both{display:grid;grid-template-columns:1fr 1fr;gap:1.2rem}
@media(max-width:45rem){.both{grid-template-columns:1fr}}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.5 inherit;font-family:inherit;margin:.3rem 0}
.prompt{background:#f4f6f8;border-radius:.4rem;padding:.5rem .8rem}
b{font-size:13px;font-weight:600;color:#5b5f67}
"""
SEARCH = """
const box=document.querySelector('input'),all=[...document.querySelectorAll('article')];
box.addEventListener('input',()=>{
  const w=box.value.toLowerCase();for(const a of all)a.hidden=!a.textContent.toLowerCase().includes(w)});
"""


def page(name: str, annotator: Annotator, summary: Summary, pairs: Sequence[Suspicious]) -> str:
    """The whole file.

    Args:
        pairs: those to show, the most suspicious first.
    """
    head = annotator.head
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(name)}, annotated</title><style>{CSS}</style></head><body>
<h1>{escape(name)}</h1>
<p>{summary.annotated:,} pairs annotated by head {escape(head["name"])} ({escape(head["kind"])},
version {head["version"]}) on {escape(annotator.model)};
{summary.flipped:,} labels look flipped; {summary.rejected:,} rows were left out.</p>
<h2>Margins</h2>
<p>Score of the chosen answer minus score of the rejected one. What stands left of zero (in orange) contradicts its
label. The outermost bars hold what lies beyond them.</p>
{_histogram(summary)}
<h2>The {len(pairs):,} most suspicious pairs</h2>
<p>Smallest margin first. A head can be wrong, too: read before you flip.</p>
<input type="search" placeholder="show only pairs that contain …" aria-label="filter">
{"".join(_article(one) for one in pairs)}
<script>{SEARCH}</script></body></html>
"""


def _histogram(summary: Summary) -> str:
    if not summary.annotated:
        return ""
    bars = "".join(_bars(*binned(summary.margin_N, BARS)))
    return f'<svg viewBox="0 0 800 150" preserveAspectRatio="none" role="img">{bars}</svg>'


def _bars(counts: NDArray[np.int64], edges: NDArray[np.float64]) -> Iterator[str]:
    width = 800 / BARS
    for n, (count, left, right) in enumerate(zip(counts, edges, edges[1:], strict=False)):
        height = 145 * count / counts.max()
        colour = "#d1742a" if right <= 0 else "#4a7fb0"
        yield (
            f'<rect x="{n * width + 1:.1f}" y="{150 - height:.1f}" width="{width - 2:.1f}" height="{height:.1f}" '
            f'fill="{colour}">'
            f"<title>{left:.3g} to {right:.3g}: {count:,}</title></rect>"
        )


def _article(one: Suspicious) -> str:
    columns = one.columns
    facts = [f"{one.source}, row {one.row}", f"margin {columns['margin']:.3f}"]
    if columns["confidence"] is not None:
        facts.append(f"confidence {columns['confidence']:.3f}")
    turns = as_turns(one.pair.prompt)
    said = "".join(f"<b>{escape(turn['role'])}</b><pre>{escape(turn['content'])}</pre>" for turn in turns)
    answers = "".join(
        f"<div><b>{name}, {columns[f'{name}_score']:.3f}</b><pre>{escape(text)}</pre></div>"
        for name, text in (("chosen", one.pair.chosen), ("rejected", one.pair.rejected))
    )
    return (
        f'<article><div class="facts">{escape(" · ".join(facts))}</div><div class="prompt">{said}</div>'
        f'<div class="both">{answers}</div></article>\n'
    )
