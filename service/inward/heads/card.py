"""What a manifest says, for people: `inward heads show`, and the card of a head on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inward.heads.base import Manifest
from inward.heads.held_out import HeldOut

KINDS = {
    "legend": "a safety direction found without training (LEGEND): margins of preference pairs",
    "hybrid": "a linear probe a layer and a gate: rewards, probabilities, a confidence for each pair",
    "srr": "a listwise ranker: the candidates of one prompt are ranked together",
    "ensemble": "several heads as one",
    "value": "predicts at any token what another head will give the finished answer",
}
POSITIONS = {
    "prompt": "the last token of the prompt",
    "last": "the last token of the response",
    "eos": "an end-of-sequence token after the response",
    "mean": "the mean over the response's tokens",
}
MEANINGS = {
    "accuracy": "share of held-out pairs whose chosen answer has the higher score",
    "auc": "probability that an acceptable response scores above one that is not, held out",
    "pairs": "preference pairs of the fit",
    "prompts": "different prompts among them",
    "held_out": "share of held-out pairs that agree with their label",
    "c": "weight of the data against the regularisation of the probes",
    "steps": "steps of training the gate",
    "spearman_length": "rank correlation of margin and difference of length",
    "length_matched": "the same as `held_out`, on pairs of nearly equal length",
    "stability": "cosine between directions of resampled pairs",
}
"""Of measurements whose names don't say it."""
TOLD_RATES = (0.01, 0.05, 0.1)
"""Of the thresholds: a small fit may know none of them."""


def card(manifest: Manifest, *, at: str | None = None) -> str:
    """Markdown. ``at`` is the repository on the hub that it is to be loaded from."""
    parts = [
        f"# {manifest.name}\n",
        f"A head of kind `{manifest.kind}`: {KINDS.get(manifest.kind, 'of a kind of its own')}.\n",
        _table(_about(manifest)),
        "## How good it is\n",
        _table(_metrics(manifest.fit.get("metrics", {}))) or "The fit kept no measurements.\n",
        "## What its numbers mean\n",
        "\n".join(_calibration(manifest.calibration)) + "\n",
        "## Before it is trusted\n",
        "These measurements are of the data that it was fitted on. On other data, and on what a policy writes that is "
        "trained against it, they have to be taken again: `inward evaluate --head … --pairs …`.\n",
    ]
    if at is not None:
        parts.append(f"## Use\n\n```sh\ninward serve --model … --heads hf://{at}\n```\n")
    return "\n".join(parts)


def headline(manifest: Manifest) -> dict[str, str]:
    """What one wants to know of a head among others: accuracy and of how many pairs, base model and date."""
    held_out = HeldOut.of(manifest.fit)
    return {
        "accuracy": "" if held_out is None else f"{held_out.agreement:.1%} of {held_out.pairs:,} pairs",
        "base model": manifest.backbone.name,
        "fitted": manifest.created[:10],
    }


def _about(manifest: Manifest) -> list[tuple[str, str, str]]:
    backbone = manifest.backbone
    layers = manifest.layers
    told = f"{layers[0]} to {layers[-1]} ({len(layers)})" if len(layers) > 6 else ", ".join(map(str, layers))
    return [
        ("version", str(manifest.version), ""),
        ("fitted", manifest.created, ""),
        ("base model", backbone.name + (f" @ {backbone.revision}" if backbone.revision else ""), ""),
        ("fingerprint", backbone.fingerprint, "of the only model that it reads"),
        ("layers", told, "index k is the residual stream after k blocks"),
        ("position", manifest.position, POSITIONS[manifest.position]),
        ("template", manifest.template, "what made texts of conversations at fitting"),
        ("data", str(manifest.fit.get("data", "unknown")), "hash of the rows of the fit"),
        ("rows", str(manifest.fit.get("rows", "unknown")), ""),
    ]


def _metrics(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for name, value in metrics.items():
        if isinstance(value, str):
            rows.append((name, value, ""))
        elif _is_number(value):
            rows.append((name, str(value) if isinstance(value, int) else f"{value:.3f}", MEANINGS.get(name, "")))
    return rows


def _calibration(known: Mapping[str, Any]) -> list[str]:
    said = []
    if platt := known.get("platt"):
        said.append(
            f"- `probability` that a response is acceptable: sigmoid({platt['slope']:.3f} · score "
            f"{platt['intercept']:+.3f}), calibrated on held-out responses."
        )
    if known.get("platt_pair"):
        said.append("- `label_probability` that a pair's label is right: calibrated on held-out pairs.")
    if std := known.get("margin_std"):
        said.append(f"- `margin_scaled`: the margin divided by {std:.3f}, its standard deviation at calibration.")
    if edges := known.get("bin_edges"):
        said.append(f"- `bin`: for a margin loss; its edges are {', '.join(f'{edge:.2f}' for edge in edges)}.")
    if deciles := known.get("score_deciles"):
        said.append(f"- Eight tenths of the calibration scores lie between {deciles[0]:.2f} and {deciles[-1]:.2f}.")
    if (acceptable := known.get("acceptable")) is not None:
        told = [
            f"{rate:.1%} of acceptable responses below {score:.2f}"
            for rate, score in zip(acceptable["rates"], acceptable["scores"], strict=True)
            if rate in TOLD_RATES
        ]
        said += [f"- Thresholds: {', '.join(told)}."] if told else []
    return said or ["It is not calibrated: only the order of its scores means something."]


def _table(rows: list[tuple[str, str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {name.replace('_', ' ')} | {value} | {meaning} |" for name, value, meaning in rows]
    return "\n".join(["| | | |", "|---|---|---|", *lines]) + "\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
