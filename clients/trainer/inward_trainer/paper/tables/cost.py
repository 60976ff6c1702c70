"""What a reward costs, in seconds and operations (the hybrid paper's figure 7). Nothing else should run on the device
meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inward.heads.online import online_step
from inward_trainer.paper.alignment import Alignment, Preference
from inward_trainer.paper.cells import Json
from inward_trainer.paper.classifier import Classifier, open_classifier
from inward_trainer.paper.experiment import Experiment
from inward_trainer.paper.heads import fit_reward_head, pair_states, scores
from inward_trainer.paper.language_model import Drawn, reading_dtype
from inward_trainer.paper.table import Row, Table
from inward_trainer.paper.texts import Ids, Text, encode_pairs, prompt_ids

COLUMNS = ["milliseconds", "per", "operations", "reward model's time over ours"]
DRAWING_REPEATS = 2
PUBLISHED = [
    ["head against a 7–13 B reward model, states given", "110 to 639 times faster, 4e4 to 9e4 times fewer FLOPs",
     "SWIFT, arXiv 2505.12225", "there the reward model is up to 13 B"],
    ["online training with our reward", "a fraction of a reward model's time", "arXiv 2503.10093, figure 7", "7 B"],
]  # fmt: skip


def table(run: Experiment) -> Table:
    """Times of the same answers in turns, medians."""
    found = run.cells.need("cost", lambda: _measured(run))
    ms, flops = found["ms"], found["operations"]
    ratios = {"head alone, states given": "reward model, forward", "head with forward pass": "reward model, forward",
              "drawing, read meanwhile": "drawing, then a reward model",
              "online step, our head": "online step, reward model"}  # fmt: skip
    rows = [
        Row(name, {
            "milliseconds": value, "per": "pair" if name.startswith(("training", "online")) else "answer",
            "operations": flops.get(name, ""),
            "reward model's time over ours": ms[ratios[name]] / value if name in ratios else "",
        })
        for name, value in ms.items()
    ]  # fmt: skip
    notes = [
        f"{found['answers']} answers of {found['tokens']:.0f} tokens with their prompts on {found['device']}; medians "
        f"of {run.sizes.repeats}, after one that is not counted ({DRAWING_REPEATS} where answers are drawn). The "
        "reward model is the backbone with a number on top; its weights do not matter here. Operations: two for a "
        "weight and token, four for two tokens, a layer and a dimension of attention.",
        "Drawing and reading meanwhile includes an end-of-sequence token's pass for what was cut at its length.",
    ]
    return Table("cost", "What a reward costs", COLUMNS, rows, notes, published=PUBLISHED)


def _measured(run: Experiment) -> Json:
    sizes = run.sizes
    asked = prompt_ids(run.tokeniser, run.held_out[: sizes.timed])
    base = run.base
    drawn = base.draw(asked, sizes.samples, sizes.tokens, 0)
    texts = _texts(run, asked, drawn)
    head = fit_reward_head(pair_states(base, run.data.head_pairs[:64]), joint_steps=10)
    model = Classifier(open_classifier(run.folder, run.pad, reading_dtype(run.device)).to(run.device), run.pad)
    states = base.states(texts)
    weight = torch.from_numpy(np.stack([tap.weight_DK[:, 0] for tap in head.readout.taps if tap.weight_DK is not None]))
    weight = weight.to(run.device, reading_dtype(run.device))
    there = torch.from_numpy(states).to(run.device, weight.dtype)
    pairs = run.data.align_pairs[: sizes.batch]
    encoded = encode_pairs(run.tokeniser, pairs, whole=sizes.answer_characters)
    preferences = [Preference(chosen, rejected) for chosen, rejected in encoded]
    alignment = Alignment(base, run.folder, lr=1e-9, steps=10_000, seed=0)

    def alone() -> None:
        values = torch.einsum("mld,ld->ml", there, weight).float().cpu().numpy()
        head.rewards(values)

    def read_meanwhile() -> None:
        with read_every_step(base.model, weight) as kept:
            base.draw(asked, sizes.samples, sizes.tokens, 0)
        head.rewards(torch.stack(kept[-head.probe_weight_LD.shape[0] :], dim=1).float().cpu().numpy())

    def draw() -> None:
        base.draw(asked, sizes.samples, sizes.tokens, 0)

    def draw_then(reward: Callable[[], Any]) -> Callable[[], None]:
        def both() -> None:
            draw()
            reward()

        return both

    few = asked[: max(1, sizes.batch)]

    def online(reward: Callable[[list[Text]], Any], *, follow: bool) -> Callable[[], None]:
        def step() -> None:
            reader = alignment.reader()
            own = _texts(run, few, reader.draw(few, sizes.samples, sizes.tokens, 0))
            if follow:
                read = reader.states(own)
                scores(head, read)
                online_step(head, read[: len(preferences)], read[-len(preferences) :])
            else:
                reward(own)
            alignment.prefer(preferences)

        return step

    ways = {
        "head alone, states given": (alone, len(texts)),
        "head with forward pass": (lambda: scores(head, base.states(texts)), len(texts)),
        "reward model, forward": (lambda: model.scores(texts), len(texts)),
        "drawing without reward": (draw, len(texts)),
        "drawing, read meanwhile": (read_meanwhile, len(texts)),
        "drawing, then head with forward pass": (draw_then(lambda: scores(head, base.states(texts))), len(texts)),
        "drawing, then a reward model": (draw_then(lambda: model.scores(texts)), len(texts)),
        "training step, given pairs": (lambda: alignment.prefer(preferences), len(preferences)),
        "online step, our head": (online(model.scores, follow=True), len(preferences)),
        "online step, reward model": (online(model.scores, follow=False), len(preferences)),
    }
    tokens = float(np.mean([len(text.ids) for text in texts]))
    own = 2.0 * weight.numel() + 2.0 * len(weight) ** 2
    forward = _operations(base.model, tokens)
    step = sum(4 * _operations(base.model, len(t.ids)) for both in encoded for t in both) / len(encoded)
    return {
        "ms": _timed(ways, run.sizes.repeats, run.device),
        "operations": {
            "head alone, states given": own, "head with forward pass": forward + own, "reward model, forward": forward,
            "training step, given pairs": step,
        },
        "answers": len(texts), "tokens": tokens,
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "a CPU",
    }  # fmt: skip


def _texts(run: Experiment, asked: Sequence[Ids], drawn: Sequence[Sequence[Drawn]]) -> list[Text]:
    """Drawn answers, none of them empty."""
    eos = [run.tokeniser.eos_id]
    return [Text(ids, one.ids or eos) for ids, row in zip(asked, drawn, strict=True) for one in row]


@contextmanager
def read_every_step(model: Any, weight_LD: Tensor) -> Iterator[list[Tensor]]:
    """While it is open, every pass leaves each layer's probe output at the last position, ``[B]`` a layer and pass."""
    kept: list[Tensor] = []

    def hook(layer: int) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            kept.append(hidden[:, -1] @ weight_LD[layer])

        return keep

    with ExitStack() as hooks:
        for layer, block in enumerate(model.base_model.layers):
            hooks.enter_context(block.register_forward_hook(hook(layer)))
        yield kept


def _operations(model: Any, tokens: float) -> float:
    """Of one text's forward pass, without the vocabulary."""
    blocks = sum(p.numel() for p in model.base_model.layers.parameters())
    config = model.config
    return float(2.0 * blocks * tokens + 2.0 * config.num_hidden_layers * config.hidden_size * tokens * tokens)


def _timed(ways: dict[str, tuple[Callable[[], Any], int]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of one answer or pair, the ways in turns. Ways that draw take seconds: they are timed less
    often.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, (way, _count) in ways.items():
            if turn > DRAWING_REPEATS and name.startswith(("drawing", "online")):
                continue
            _wait(device)
            began = time.perf_counter()
            way()
            _wait(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(seconds[name][1:]) / count for name, (_, count) in ways.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
