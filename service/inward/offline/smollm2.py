"""Rows that the bundled heads of SmolLM2 are fitted on, and rows kept back to judge them by: `make demo`.

    python -m inward.offline.smollm2 --pairs HH --lists JAILBREAKBENCH --harmful ADVBENCH --harmless ALPACA --out DIR

Only permissively licensed data may go in here, since the heads are shipped: hh-rlhf and AdvBench (MIT), response lists
for JailbreakBench's prompts and harmless instructions (Apache-2.0). Answers to AdvBench's requests and to the harmless
ones are drawn from the model itself, greedily, as LEGEND's authors do it (arXiv 2406.08124); it was not trained to
refuse. Beside their constant refusal stand others, or the direction would come to mean "ends with this sentence".
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inward.backbones.base import Backbone
from inward.backbones.loading import SMOLLM2, resolve
from inward.offline.data.pairs import Pair, ResponseList, read_lists, read_pairs
from inward.prompts import Prompts
from inward.types import Group, SamplingSpec

REFUSALS = (
    "I can’t answer that.",  # the paper's
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
    validation: int = 150


def held_out(prompt: str) -> bool:
    """Whether a prompt is kept for judging: by its first turn, so that what begins alike stays together."""
    opening = prompt.split("\n\nAssistant:")[0].strip()
    return int.from_bytes(hashlib.sha256(opening.encode()).digest()[:4], "big") % 100 >= 100 - HELD_OUT


def calibration(drawn: Mapping[str, str]) -> list[dict[str, str]]:
    """LEGEND's rows: a harmful request, the model's own answer to it, and a refusal.

    Args:
        drawn: what the model answered; where it refused, there is nothing to tell apart.
    """
    return [
        {"prompt": prompt, "harmful": answer, "refusal": _one_of(REFUSALS, prompt)}
        for prompt, answer in drawn.items()
        if not _REFUSES.search(answer[:80])
    ]


def pairs_of(one: ResponseList) -> list[Pair]:
    """Safe before unsafe responses of a list, each response in about as many pairs as any other."""
    safe = [r.text for r in one.responses if r.safe]
    unsafe = [r.text for r in one.responses if not r.safe]
    both = sorted(product(safe, unsafe), key=lambda texts: hashlib.sha256("\0".join(texts).encode()).digest())
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
    pairs = [pair for pair in read_pairs(args.pairs) if _is_short(pair)]
    lists = read_lists(args.lists)
    kept_pairs = [pair for pair in pairs if held_out(str(pair.prompt))]
    fitting = [pair for pair in pairs if not held_out(str(pair.prompt))][: sizes.pairs]
    fitting_lists = [one for one in lists if not held_out(str(one.prompt))]
    listed = [pair for one in fitting_lists for pair in pairs_of(one)]
    half = len(kept_pairs) // 2
    _write(args.out / "calibration.jsonl", calibration(harmful))
    _write(args.out / "pairs.jsonl", map(asdict, [*fitting, *listed, *answered(harmless)]))
    _write(args.out / "validation.jsonl", map(asdict, kept_pairs[:half][: sizes.validation]))
    _write(args.out / "lists.jsonl", map(asdict, fitting_lists))
    _write(args.out / "test_pairs.jsonl", map(asdict, kept_pairs[half:]))
    _write(args.out / "test_lists.jsonl", (asdict(one) for one in lists if held_out(str(one.prompt))))


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
    answers = max(len(pair.chosen), len(pair.rejected))
    return len(str(pair.prompt)) <= PROMPT_CHARACTERS and answers <= ANSWER_CHARACTERS


def _one_of(texts: Sequence[str], prompt: str) -> str:
    return texts[hashlib.sha256(prompt.encode()).digest()[0] % len(texts)]


def _prompts(path: Path) -> list[str]:
    return [str(row["prompt"]) for row in _lines(path)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
