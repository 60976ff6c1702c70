"""How much of everything."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from inward_trainer.errors import OptionsError
from inward_trainer.options import PaperOptions

FEWEST = 4
"""Of whatever is counted in rows or prompts, however small the share."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The defaults are for one GPU; ``chosen`` makes less of them on a processor."""

    held_out: int = 160
    """Prompts of each held-out source."""
    xstest: int = 100
    """Harmless prompts of XSTest, and as many of their harmful contrasts."""
    harmless: int = 64
    """Harmless instructions that are answered."""
    plain_texts: int = 150
    """Harmless texts whose perplexity is measured."""
    judge_rows: int = 5000
    """Answers that judges are trained on."""
    judge_epochs: int = 2
    head_pairs: int = 1500
    """Pairs that the reward head and the reward model of its size are fitted on."""
    train_prompts: int = 384
    """Prompts that policies are aligned on."""
    margin_pairs: int = 2000
    """Pairs that LEGEND's reward models are trained on."""
    test_pairs: int = 600
    """Held-out pairs that reward models and probes are judged on."""
    calibration: int = 200
    """Harmful requests whose greedy answers give LEGEND its direction."""
    list_prompts: int = 120
    """Prompts whose own drawn answers are ranked."""
    samples: int = 8
    """Answers of a prompt to choose from."""
    answers: int = 2
    """Answers of a prompt by which a policy is judged."""
    steps: int = 48
    """Optimiser steps of every way to align."""
    rounds: int = 6
    """Draws of an online run; between them the policy stands still."""
    batch: int = 16
    """Pairs in one step."""
    tokens: int = 96
    """Most tokens of a drawn answer."""
    prompt_characters: int = 600
    """Longer prompts are left out."""
    answer_characters: int = 700
    """Longer given answers are cut."""
    epochs: int = 60
    """Most epochs of a ranker."""
    timed: int = 64
    """Prompts whose answers are timed."""
    repeats: int = 5
    """Timings of one thing."""
    joint_steps: int = 200
    """Most steps of a hybrid head's joint training."""

    def scaled(self, share: float) -> Sizes:
        """With another number of rows and prompts; lengths, samples and steps stay."""
        counted = ("held_out", "xstest", "harmless", "plain_texts", "judge_rows", "head_pairs", "train_prompts",
                   "margin_pairs", "test_pairs", "calibration", "list_prompts", "timed")  # fmt: skip
        assert {one.name for one in fields(self)} >= set(counted)
        return replace(self, **{name: max(FEWEST, round(share * getattr(self, name))) for name in counted})


QUICK = Sizes(
    held_out=12, xstest=8, harmless=6, plain_texts=12, judge_rows=160, judge_epochs=1, head_pairs=60, train_prompts=16,
    margin_pairs=48, test_pairs=60, calibration=12, list_prompts=10, samples=4, answers=1, steps=4, rounds=2, batch=4,
    tokens=16, prompt_characters=300, answer_characters=200, epochs=5, timed=12, repeats=1, joint_steps=20,
)  # fmt: skip
"""Everything once, in minutes on two cores with the toy: its numbers say nothing."""

SCALE_ON_A_PROCESSOR = 0.1
STEPS_ON_A_PROCESSOR = 16
"""What two cores do in some hours."""


def chosen(options: PaperOptions, device: torch.device) -> tuple[float, Sizes]:
    """The share of rows and prompts, and how much of everything that is: as asked, else by the device.

    Raises:
        OptionsError: there is no such size.
    """
    known = [one.name for one in fields(Sizes)]
    if unknown := sorted(set(options.sizes) - set(known)):
        raise OptionsError(f"--sizes: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    slow = device.type == "cpu" and not options.quick
    scale = options.scale or (SCALE_ON_A_PROCESSOR if slow else 1.0)
    sizes = (QUICK if options.quick else Sizes()).scaled(scale)
    return scale, replace(sizes, **({"steps": STEPS_ON_A_PROCESSOR} if slow else {}) | options.sizes)
