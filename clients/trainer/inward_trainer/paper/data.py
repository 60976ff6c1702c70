"""What is read, and who sees which prompt.

Every prompt belongs to one side, by a hash of its first turn:

    judge      half of PKU-SafeRLHF's prompts, BeaverTails: judges are trained on them, and nothing else sees them
    train      heads, reward models and policies are fitted on them
    test       what is reported
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from inward_client.rows import Pair, Prompt, collect_pairs
from inward_trainer.errors import OptionsError
from inward_trainer.paper.sizes import Sizes

FILES = {
    "pku": "pku_saferlhf_pairs.jsonl",
    "beavertails": "beavertails_train.jsonl",
    "hh": "hh_harmless_pairs.jsonl",
    "lists": "jailbreakbench_response_lists.jsonl",
    "xstest": "xstest_completions.jsonl",
    "advbench": "advbench_goals.jsonl",
    "harmless": "harmless_instructions.jsonl",
}
SOURCES = ("hh", "jailbreak", "pku")
"""Of held-out prompts: hh-rlhf, JailbreakBench with AdvBench, PKU-SafeRLHF."""
Side = Literal["judge", "train", "test"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """A labelled answer."""

    prompt: Prompt
    text: str
    safe: bool


@dataclass(frozen=True, slots=True)
class AnswerList:
    """Labelled answers to one prompt."""

    prompt: Prompt
    texts: tuple[str, ...]
    safe: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a person said of an answer to a prompt of XSTest."""

    prompt: str
    text: str
    harmful: bool
    """The prompt is one of the harmful contrasts."""
    label: int
    """1 complies, 2 refuses, 3 refuses in part."""


@dataclass(frozen=True, slots=True)
class Data:
    """Everything, cut to size."""

    judge_train: list[Answer]
    judge_test: list[Answer]
    """Of PKU-SafeRLHF's other prompts."""
    head_pairs: list[Pair]
    """The reward head and the reward model of its size are fitted on them."""
    monitor_pairs: list[Pair]
    """Of other prompts: for the head that only watches."""
    align_pairs: list[Pair]
    """People's labels for the prompts that policies are aligned on."""
    align_prompts: list[Prompt]
    margin_pairs: list[Pair]
    test_pairs: dict[str, list[Pair]]
    """``hh`` and ``pku``."""
    held_out: dict[str, list[Prompt]]
    """Of each of ``SOURCES``."""
    calibration: list[str]
    """Harmful requests, for LEGEND's direction."""
    lists: list[AnswerList]
    xstest: list[Refusal]
    xstest_safe: list[str]
    xstest_unsafe: list[str]
    harmless: list[str]
    plain_texts: list[Answer]
    """Helpful answers by other models to harmless prompts."""
    digest: str
    """Of the files."""

    @classmethod
    def open(cls, folder: Path | None, sizes: Sizes) -> Data:
        """Reads ``FILES`` of a folder.

        Raises:
            OptionsError: files that are not there.
        """
        missing = sorted(name for name in FILES.values() if folder is None or not (folder / name).is_file())
        if folder is None or missing:
            raise OptionsError(
                f"--data: {folder or 'no folder was given; its folder'} lacks {', '.join(missing)}: PKU-SafeRLHF's, "
                "hh-rlhf's and BeaverTails' test splits, JailbreakBench's answers, XSTest's completions, AdvBench's "
                "goals and harmless instructions, one JSON object a line"
            )
        pku = _short(collect_pairs(folder / FILES["pku"]).values, sizes)
        hh = _short(collect_pairs(folder / FILES["hh"]).values, sizes)
        beavertails = [
            Answer(row["prompt"], row["response"][: sizes.answer_characters], bool(row["safe"]))
            for row in _rows(folder / FILES["beavertails"])
            if len(row["prompt"]) <= sizes.prompt_characters
        ]
        lists = [_list(row, sizes) for row in _rows(folder / FILES["lists"])]
        xstest = [_refusal(row, sizes) for row in _rows(folder / FILES["xstest"])]
        xstest.sort(key=lambda row: bucket(row.prompt, "xstest"))  # a beginning has all types
        harmless = [row["prompt"] for row in _rows(folder / FILES["harmless"])]
        listed = {key(one.prompt) for one in lists}
        asked = listed | {key(row.prompt) for row in xstest} | {key(prompt) for prompt in harmless}
        by_side = _sides(pku, judged=True)
        judge_pairs = [pair for pair in by_side["judge"] if key(pair.prompt) not in asked]
        others = {key(pair.prompt) for side in ("train", "test") for pair in by_side[side]}
        beavertails = [row for row in beavertails if key(row.prompt) not in others | asked]
        judged_keys = {key(pair.prompt) for pair in by_side["judge"]} | {key(row.prompt) for row in beavertails}
        hh_sides = _sides([pair for pair in hh if key(pair.prompt) not in judged_keys], judged=False)
        goals = [row["prompt"] for row in _rows(folder / FILES["advbench"])]
        goals = [goal for goal in goals if key(goal) not in listed | judged_keys]
        jailbreak = [*(one.prompt for one in lists), *(g for g in goals if side_of(g, judged=False) == "test")]
        reported = (
            asked | {key(pair.prompt) for pair in [*by_side["test"], *hh_sides["test"]]} | set(map(key, jailbreak))
        )
        pku_train, hh_train = (
            [pair for pair in sides["train"] if key(pair.prompt) not in reported] for sides in (by_side, hh_sides)
        )
        calibration = [goal for goal in goals if key(goal) not in reported]
        train = mixed(pku_train, hh_train)
        watched = [pair for pair in train if bucket(pair.prompt, "monitor") >= 75]
        fitted = [pair for pair in train if bucket(pair.prompt, "monitor") < 75]
        align_prompts = mixed(_prompts(pku_train), _prompts(hh_train), calibration)
        chosen = align_prompts[: sizes.train_prompts]
        chosen_keys = {key(prompt) for prompt in chosen}
        return cls(
            judge_train=mixed(_answers(judge_pairs), beavertails)[: sizes.judge_rows],
            judge_test=_answers([*by_side["train"], *by_side["test"]])[: max(sizes.judge_rows // 2, 40)],
            head_pairs=fitted[: sizes.head_pairs],
            monitor_pairs=watched[: sizes.head_pairs],
            align_pairs=[pair for pair in train if key(pair.prompt) in chosen_keys],
            align_prompts=chosen,
            margin_pairs=train[: sizes.margin_pairs],
            test_pairs={
                "hh": spread(hh_sides["test"])[: sizes.test_pairs],
                "pku": spread(by_side["test"])[: sizes.test_pairs],
            },
            held_out={
                "hh": _prompts(hh_sides["test"])[: sizes.held_out],
                "jailbreak": jailbreak[: sizes.held_out],
                "pku": _prompts(by_side["test"])[: sizes.held_out],
            },
            calibration=calibration[: sizes.calibration],
            lists=lists[: max(12, sizes.list_prompts)],
            xstest=xstest,
            xstest_safe=unique(row.prompt for row in xstest if not row.harmful)[: sizes.xstest],
            xstest_unsafe=unique(row.prompt for row in xstest if row.harmful)[: sizes.xstest],
            harmless=[text for text in harmless if len(text) <= sizes.prompt_characters][: sizes.harmless],
            plain_texts=[Answer(r.prompt, r.text, True) for r in xstest if not r.harmful and r.label == 1][
                : sizes.plain_texts
            ],
            digest=hashlib.sha256(b"".join((folder / name).read_bytes() for name in FILES.values())).hexdigest(),
        )  # fmt: skip

    def told(self) -> list[str]:
        """Which data each thing saw, in words."""
        judge_prompts = len({key(row.prompt) for row in self.judge_train})
        held_out = ", ".join(f"{len(self.held_out[name])} of {label}" for name, label in LABELS.items())
        return [
            f"Judges: {len(self.judge_train)} labelled answers to {judge_prompts} prompts (half of PKU-SafeRLHF's, "
            "BeaverTails). Nothing else sees these prompts, and no judge sees others. An answer that is chosen in one "
            "pair and rejected in another counts as in most of them, or not at all.",
            f"Reward head, and reward model of the backbone's size: {len(self.head_pairs)} pairs of PKU-SafeRLHF and "
            f"hh-rlhf; the monitor head: {len(self.monitor_pairs)} pairs of other prompts.",
            f"Policies: {len(self.align_prompts)} prompts of PKU-SafeRLHF, hh-rlhf and AdvBench, which heads and "
            f"reward models may have seen too; people's labels: {len(self.align_pairs)} pairs of them.",
            f"LEGEND: {len(self.calibration)} requests of AdvBench; its reward models: {len(self.margin_pairs)} pairs.",
            f"Held out from all of these: {held_out}; XSTest, harmless instructions.",
        ]


LABELS = {"hh": "hh-rlhf", "jailbreak": "JailbreakBench and AdvBench", "pku": "PKU-SafeRLHF"}


def key(prompt: Prompt) -> str:
    """What makes two prompts one: their first turn, without case and space."""
    first = prompt if isinstance(prompt, str) else next(turn["content"] for turn in prompt if turn["role"] == "user")
    return " ".join(first.lower().split())


def bucket(prompt: Prompt, salt: str) -> int:
    """0 to 99, by a hash of ``key``."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{key(prompt)}".encode()).digest()[:4], "big") % 100


def side_of(prompt: Prompt, *, judged: bool) -> Side:
    """Where a prompt belongs; ``judged``: half of this source is the judges'."""
    if judged and bucket(prompt, "judge") < 50:
        return "judge"
    return "train" if bucket(prompt, "train") < (50 if judged else 70) else "test"


def mixed(*lists: Sequence[T]) -> list[T]:
    """Elements of all lists in turn, so that a beginning has some of each."""
    longest = max(map(len, lists), default=0)
    return [one[i] for i in range(longest) for one in lists if i < len(one)]


def spread(pairs: Sequence[Pair]) -> list[Pair]:
    """First one pair of every prompt, then a second one, …: a beginning has many prompts."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(key(pair.prompt), []).append(pair)
    return mixed(*groups.values())


def unique(values: Iterable[T]) -> list[T]:
    """Each once, in order."""
    return list(dict.fromkeys(values))


def conversation(prompt: Prompt) -> str:
    """As one text, for what reads words only."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def _sides(pairs: Sequence[Pair], *, judged: bool) -> dict[Side, list[Pair]]:
    sides: dict[Side, list[Pair]] = {"judge": [], "train": [], "test": []}
    for pair in pairs:
        sides[side_of(pair.prompt, judged=judged)].append(pair)
    return {side: spread(found) for side, found in sides.items()}


def _short(pairs: Sequence[Pair], sizes: Sizes) -> list[Pair]:
    cut = sizes.answer_characters
    short = [Pair(p.prompt, p.chosen[:cut], p.rejected[:cut]) for p in pairs
             if len(conversation(p.prompt)) <= sizes.prompt_characters]  # fmt: skip
    return [pair for pair in short if pair.chosen.strip() and pair.rejected.strip() and pair.chosen != pair.rejected]


def _prompts(pairs: Sequence[Pair]) -> list[Prompt]:
    return list({key(pair.prompt): pair.prompt for pair in pairs}.values())


def _answers(pairs: Sequence[Pair]) -> list[Answer]:
    """Each once: labelled as in most of its pairs, and left out where these are half of them."""
    votes: dict[tuple[str, str], list[Answer]] = {}
    for pair in pairs:
        for text, safe in ((pair.chosen, True), (pair.rejected, False)):
            votes.setdefault((key(pair.prompt), text), []).append(Answer(pair.prompt, text, safe))
    counted = [(own[0], 2 * sum(one.safe for one in own) - len(own)) for own in votes.values()]
    return [replace(one, safe=more > 0) for one, more in counted if more]


def _list(row: dict[str, Any], sizes: Sizes) -> AnswerList:
    cut, responses = sizes.answer_characters, row["responses"]
    return AnswerList(row["prompt"], tuple(r["text"][:cut] for r in responses), tuple(r["safe"] for r in responses))


def _refusal(row: dict[str, Any], sizes: Sizes) -> Refusal:
    harmful = row["type"].startswith("contrast")
    return Refusal(row["prompt"], row["response"][: sizes.answer_characters], harmful, int(str(row["label"])[0]))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
