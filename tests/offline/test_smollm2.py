"""What the bundled heads of SmolLM2 are fitted on: the rows, not the model."""

from __future__ import annotations

import json
from pathlib import Path

from inward.backbones.fake import FakeBackbone
from inward.offline import smollm2, toy
from inward.offline.data.pairs import Pair, Response, ResponseList
from inward.prompts import Prompts
from support import tiny_tokenizer


def test_what_begins_alike_is_on_one_side_and_about_a_third_is_kept() -> None:
    questions = [{"role": "user", "content": f"question {n}"} for n in range(1000)]
    kept = [smollm2.held_out([question]) for question in questions]
    assert 0.25 < sum(kept) / 1000 < 0.35
    longer = [{"role": "assistant", "content": "an answer"}, {"role": "user", "content": "more"}]
    assert [smollm2.held_out([question, *longer]) for question in questions] == kept
    transcripts = [f"Human: {question['content']}\n\nAssistant:" for question in questions]
    assert [toy.split_of(transcript) != "train" for transcript in transcripts] == kept


def test_a_request_that_the_model_refused_teaches_no_direction() -> None:
    rows = smollm2.calibration(
        {"a": "Sure, first open the lock.", "b": "I'm sorry, but I cannot do that.", "c": "Here:"}
    )
    assert [row.prompt for row in rows] == ["a", "c"]
    assert all(row.refusal in smollm2.REFUSALS for row in rows)
    assert smollm2.calibration({"a": "Sure."}) == smollm2.calibration({"a": "Sure."})


def test_lists_become_pairs_of_a_safe_and_an_unsafe_response() -> None:
    responses = tuple(Response(f"{'safe' if n % 3 else 'unsafe'} {n}", bool(n % 3)) for n in range(12))
    pairs = smollm2.pairs_of(ResponseList("p", responses))
    assert len(set(pairs)) == smollm2.PAIRS_PER_LIST
    assert all(pair.chosen.startswith("safe") and pair.rejected.startswith("unsafe") for pair in pairs)
    assert smollm2.pairs_of(ResponseList("p", responses[1:3])) == []


def test_refusing_what_is_harmless_is_the_worse_answer() -> None:
    (pair,) = smollm2.answered({"How do I bake bread?": "Mix flour and water.", "Why?": "I can't say."})
    assert pair == Pair("How do I bake bread?", "Mix flour and water.", pair.rejected)
    assert pair.rejected in smollm2.REFUSALS


async def test_answers_that_were_drawn_are_not_drawn_again(tmp_path: Path) -> None:
    backbone = FakeBackbone(2, 8)
    prompts = Prompts(tiny_tokenizer.tokenizer(), max_tokens=256)
    kept = tmp_path / "drawn.jsonl"
    first = await smollm2.draw(backbone, prompts, ["one", "two"], kept)
    kept.write_text(kept.read_text().replace(json.dumps(first["one"]), '"as kept"'))
    again = await smollm2.draw(backbone, prompts, ["one", "two", "three"], kept)
    assert (again["one"], again["two"]) == ("as kept", first["two"])
    assert len(kept.read_text().splitlines()) == 3
