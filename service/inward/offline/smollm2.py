"""Rows that the bundled heads of SmolLM2 are fitted on, and rows kept back to judge them by: `make demo`.

    python -m inward.offline.smollm2 --pairs HH --lists JAILBREAKBENCH --harmful ADVBENCH --harmless ALPACA --out DIR

Only permissively licensed data may go in here, since the heads are shipped: hh-rlhf and AdvBench (MIT), response lists
for JailbreakBench's prompts and harmless instructions (Apache-2.0). Answers to AdvBench's requests and to the harmless
ones are drawn from the model itself, greedily, as LEGEND's authors do it (arXiv 2406.08124); it was not trained to
refuse. Where they have one constant refusal there are several here, or the direction would come to mean "ends with this
sentence".
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from inward.backbones.base import Backbone
from inward.backbones.loading import SMOLLM2, resolve
from inward.offline.data.pairs import CalibrationRow, Pair, Response, ResponseList, read_lists, read_pairs
from inward.prompts import Prompt, Prompts
from inward.types import Group, SamplingSpec

Row = TypeVar("Row", Pair, ResponseList)

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist with that request.",
    "Sorry, I won't provide instructions for something harmful.",
    "I'm not able to help with this, because it could hurt people.",
    "No. What you ask for is illegal, and I will not help with it.",
    "I can't help with that. If you are in danger or thinking of hurting yourself, please talk to someone you trust.",
    "That would be harmful to others, so I have to decline.",
)
DRAWN_TOKENS = 48
"""Of each drawn answer: by then it is clear what kind of answer it is."""
PROMPT_CHARACTERS, ANSWER_CHARACTERS = 900, 700
"""Pairs with longer texts are left out: reading them costs most of the time."""
LIST_CHARACTERS, LIST_RESPONSES = 400, 9
"""Responses of lists are cut, and there are at most so many: the same goes for their time."""
PAIRS_PER_LIST = 6
HELD_OUT = 30
"""Per cent of the prompts that no head is fitted on."""
_REFUSES = re.compile(r"\b(sorry|apologi[sz]e|can(no|')t|unable|not able|won't|will not|illegal)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows of each kind; the defaults take about an hour on one core."""

    harmful: int = 240
    harmless: int = 100
    pairs: int = 420
    monitor: int = 150
    """Pairs of other prompts, for the head that watches the first; LEGEND's rows come to them."""


def held_out(prompt: Prompt) -> bool:
    """Whether a prompt is kept for judging: by its first turn, so that what begins alike stays together (and is on the
    side that the toy's training has it on).
    """
    return _hundredth(prompt if isinstance(prompt, str) else f"Human: {prompt[0]['content']}") >= 100 - HELD_OUT


def calibration(drawn: Mapping[str, str]) -> list[CalibrationRow]:
    """LEGEND's rows: a harmful request, the model's own answer to it, and a refusal.

    Args:
        drawn: what the model answered; where it refused, there is nothing to tell apart.
    """
    return [
        CalibrationRow(prompt, answer, _one_of(REFUSALS, prompt))
        for prompt, answer in drawn.items()
        if not _REFUSES.search(answer[:80])
    ]


def shortened(one: ResponseList) -> ResponseList:
    """The beginnings of some responses of a list, of the rarer label as many as may be."""
    chosen: dict[bool, list[int]] = {}
    order = sorted(range(len(one.responses)), key=lambda i: _digest(one.responses[i].text[:LIST_CHARACTERS]))
    for label in (True, False):
        chosen[label] = [i for i in order if one.responses[i].safe == label]
    safe = min(len(chosen[True]), max(4, LIST_RESPONSES - len(chosen[False])))
    kept = sorted([*chosen[True][:safe], *chosen[False][: LIST_RESPONSES - safe]])
    return ResponseList(
        one.prompt, tuple(Response(r.text[:LIST_CHARACTERS], r.safe) for r in map(one.responses.__getitem__, kept))
    )


def pairs_of(one: ResponseList) -> list[Pair]:
    """Safe before unsafe responses of a list, each response in about as many pairs as any other."""
    safe = [r.text for r in one.responses if r.safe]
    unsafe = [r.text for r in one.responses if not r.safe]
    both = sorted(product(safe, unsafe), key=lambda texts: _digest("\0".join(texts)))
    return [Pair(one.prompt, *texts) for texts in both[:PAIRS_PER_LIST]]


def answered(drawn: Mapping[str, str]) -> list[Pair]:
    """Harmless requests: an answer before a refusal, so that refusing is not what a head takes for safety."""
    return [Pair(p, answer, _one_of(REFUSALS, p)) for p, answer in drawn.items() if not _REFUSES.search(answer[:80])]


async def draw(backbone: Backbone, prompts: Prompts, asked: Sequence[str], kept: Path) -> dict[str, str]:
    """The model's greedy answer to each prompt; those in ``kept`` are not drawn again, and new ones are added to it."""
    drawn = _drawn(kept)
    spec = SamplingSpec(n=1, temperature=0, max_tokens=DRAWN_TOKENS)
    with kept.open("a", encoding="utf-8") as file:
        for prompt in tqdm([p for p in asked if p not in drawn], desc="draw answers", unit="answer"):
            group = prompts.group(prompt, [], truncate=True).group
            (sample,) = await backbone.sample(Group(group.prompt_ids, (), sampling=spec))
            drawn[prompt] = sample.text
            file.write(json.dumps({"prompt": prompt, "response": sample.text}) + "\n")
            file.flush()
    return {prompt: drawn[prompt] for prompt in asked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pairs", "lists", "harmful", "harmless", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = Sizes()
    asked = [_prompts(args.harmful)[: sizes.harmful], _prompts(args.harmless)[: sizes.harmless]]
    harmful, harmless = asyncio.run(_draw_all(asked, args.out / "drawn.jsonl"))
    pairs, test_pairs = _apart(pair for pair in read_pairs(args.pairs) if _is_short(pair))
    lists, test_lists = _apart(map(shortened, read_lists(args.lists)))
    listed = [pair for one in lists for pair in pairs_of(one)]
    calibrating = calibration(harmful)
    labelled = [*pairs[: sizes.pairs], *listed]
    files: dict[str, Sequence[Any]] = {
        "calibration": calibrating,
        "validation": labelled,
        "pairs": [*labelled, *answered(harmless)],
        "monitor": [*pairs[sizes.pairs :][: sizes.monitor], *(row.pair for row in calibrating)],
        "lists": lists,
        "test_pairs": test_pairs,
        "test_lists": test_lists,
    }
    for name, rows in files.items():
        _write(args.out / f"{name}.jsonl", rows)


async def _draw_all(asked: Sequence[Sequence[str]], kept: Path) -> list[dict[str, str]]:
    from inward.backbones.tokenizer import load_tokenizer
    from inward.backbones.transformers.backbone import TransformersBackbone

    folder = resolve(SMOLLM2)
    backbone = TransformersBackbone(folder, name=SMOLLM2)
    try:
        prompts = Prompts(load_tokenizer(folder), max_tokens=backbone.info.max_tokens)
        return [await draw(backbone, prompts, each, kept) for each in asked]
    finally:
        await backbone.close()


def _drawn(kept: Path) -> dict[str, str]:
    return {row["prompt"]: row["response"] for row in _lines(kept)} if kept.is_file() else {}


def _is_short(pair: Pair) -> bool:
    asked = len(pair.prompt) if isinstance(pair.prompt, str) else sum(len(turn["content"]) for turn in pair.prompt)
    return asked <= PROMPT_CHARACTERS and max(len(pair.chosen), len(pair.rejected)) <= ANSWER_CHARACTERS


def _one_of(texts: Sequence[str], prompt: str) -> str:
    return texts[_hundredth(prompt) % len(texts)]


def _hundredth(text: str) -> int:
    """A number from 0 to 99 that stands for the text."""
    return int.from_bytes(_digest(text)[:4], "big") % 100


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _prompts(path: Path) -> list[str]:
    return [str(row["prompt"]) for row in _lines(path)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _apart(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """What heads are fitted on, and what they are judged by."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[held_out(row.prompt)].append(row)
    return sides


def _write(path: Path, rows: Iterable[Any]) -> None:
    plain = (asdict(row) if is_dataclass(row) and not isinstance(row, type) else row for row in rows)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain), encoding="utf-8")


if __name__ == "__main__":
    main()
