"""From logits to tokens: what is left out, and that what is drawn has the probabilities that are left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from inward.backbones.transformers.sampling import Choice, choose, filtered
from inward.types import SamplingSpec

V = 40
LOGITS = torch.randn((3, V), generator=torch.Generator().manual_seed(0)) * 2


def draw(logits: torch.Tensor, spec: SamplingSpec, n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    tokens = choose(logits.expand(n, -1), [Choice(spec, (), rng)] * n)
    return np.bincount(tokens, minlength=logits.shape[-1]) / n


@pytest.mark.parametrize(
    ("spec", "processors"),
    [
        (SamplingSpec(1, top_p=0.7), [TopPLogitsWarper(0.7)]),
        (SamplingSpec(1, min_p=0.2), [MinPLogitsWarper(0.2)]),
        (SamplingSpec(1, top_p=0.0), [TopPLogitsWarper(1e-9)]),
    ],
)
def test_what_is_left_out_is_what_transformers_leaves_out(spec: SamplingSpec, processors: list[object]) -> None:
    ids = torch.zeros((3, 0), dtype=torch.long)
    expected = LogitsProcessorList(processors)(ids, LOGITS.clone())
    assert torch.equal(filtered(LOGITS, spec).isfinite(), expected.isfinite())


def test_top_k_keeps_the_k_likeliest() -> None:
    kept = filtered(LOGITS, SamplingSpec(1, top_k=5)).isfinite()
    assert kept.sum(dim=1).tolist() == [5, 5, 5]
    assert torch.equal(kept, LOGITS.sort(descending=True).values[:, 4:5] <= LOGITS)


@pytest.mark.parametrize(
    "spec", [SamplingSpec(1), SamplingSpec(1, temperature=0.5, top_k=6), SamplingSpec(1, top_p=0.6)]
)
def test_tokens_are_drawn_with_the_probabilities_that_are_left(spec: SamplingSpec) -> None:
    expected = filtered(LOGITS[:1] / spec.temperature, spec).softmax(dim=-1)[0].numpy()
    n = 20_000
    frequencies = draw(LOGITS[:1], spec, n)
    assert not frequencies[expected == 0].any()
    assert np.abs(frequencies - expected).max() <= 5 * 0.5 / np.sqrt(n)


def test_a_penalty_makes_tokens_of_the_text_less_likely_as_in_transformers() -> None:
    text, spec = (3, 7, 7, 21), SamplingSpec(1, temperature=0, repetition_penalty=50.0)
    likeliest = int(LOGITS[0].argmax())
    penalised = RepetitionPenaltyLogitsProcessor(50.0)(torch.tensor([[*text, likeliest]]), LOGITS[:1].clone())
    assert choose(LOGITS[:1], [Choice(spec, (*text, likeliest), np.random.default_rng(0))]) == [int(penalised.argmax())]
    assert choose(LOGITS[:1], [Choice(spec, text, np.random.default_rng(0))]) == [likeliest]


def test_rows_of_other_callers_change_nothing() -> None:
    def choice(seed: int, **spec: float) -> Choice:
        return Choice(SamplingSpec(1, **spec), (1, 2), np.random.default_rng(seed))  # type: ignore[arg-type]

    alone = [choose(LOGITS[i : i + 1], [choice(i)])[0] for i in range(3)]
    rows = [LOGITS[0], LOGITS[2], LOGITS[1]]
    mixed = choose(torch.stack(rows), [choice(0), choice(9, temperature=0.0), choice(1)])
    assert [mixed[0], mixed[2]] == alone[:2]
    assert mixed[1] == int(LOGITS[2].argmax())
