"""Rows of a bulk job, or of a file that is annotated, to their answers: what the same rows get in a request, without
HTTP in between.

One parse (``parse``), one check of the shape, one pass through the corridor for all rows of a call. Whatever is wrong
with a row stands in its place and names the row's own field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from inward.api import elements
from inward.api.body import strict_json
from inward.api.errors import explain
from inward.api.scoring import Result, find_head, score_each, tokenise
from inward.api.services import Services
from inward.errors import InvalidField, InwardError
from inward.types import HeadRef, Kind, Scored
from inward.wire import Element, ErrorDetail, Item, PairItem, ScoringOptions

RowsKind = Literal["margin", "score", "reward"]
"""A bulk job's kind is the route whose elements its rows are; a row of ``reward`` is a pair where it has ``chosen``."""
KINDS: Mapping[RowsKind, tuple[Kind, ...]] = {
    "margin": elements.MARGIN_KINDS, "score": elements.SCORE_KINDS, "reward": elements.REWARD_KINDS,
}  # fmt: skip
"""Which heads do which kind of job."""

Row = Mapping[str, Any]
_PAIR, _ITEM = TypeAdapter(PairItem), TypeAdapter(Item)


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """What became of one row; who answered is known where the row was scored."""

    element: Element
    head: HeadRef | None = None
    policy_version: str | None = None
    confidence_head: HeadRef | None = None
    """The one that gave ``confidence``, where it isn't ``head``."""
    tokens: int = 0
    """Of its prompt and responses."""

    @property
    def error(self) -> ErrorDetail | None:
        """Why there is no score."""
        return self.element.error

    @property
    def by(self) -> dict[str, Any] | None:
        """Who answered, as JSON: ``head``, ``policy_version``, and the ``confidence_head`` of a margin."""
        if self.head is None:
            return None
        confidence = self.confidence_head or (self.head if self.head.kind in elements.REWARD_KINDS else None)
        return {
            "head": asdict(self.head), "policy_version": self.policy_version,
            "confidence_head": asdict(confidence) if confidence else None,
        }  # fmt: skip

    def body(self) -> dict[str, Any]:
        """As JSON, with the head and the policy where it was scored."""
        by = {"head": asdict(self.head), "policy_version": self.policy_version} if self.head is not None else {}
        return self.element.model_dump() | by


def parse(line: str) -> Row | InwardError:
    """The JSON object in a line, or what is wrong with it."""
    try:
        row = strict_json(line)
    except RecursionError:
        return InvalidField("this row is nested too deeply")
    except ValueError as error:
        return InvalidField(f"this row is not JSON: {error}")
    return row if isinstance(row, dict) else InvalidField("this row is not a JSON object")


async def score_rows(
    services: Services,
    kind: RowsKind,
    rows: Sequence[Row | InwardError],
    *,
    head: str | None = None,
    options: ScoringOptions | None = None,
) -> list[RowAnswer]:
    """One answer a row, in their order. Rows that are an error already keep it.

    Args:
        head: its name; by default the first loaded one of the kinds that do this.
        options: ``truncate`` and ``timeout`` of all rows together.

    Raises:
        NotFound: there is no such head.
        Unavailable, DeadlineExceeded: not the fault of any one row; the same rows may be sent again, or fewer.
        OverQuota: the caller's key has used up what it may have computed in a minute.
    """
    checked = [row if isinstance(row, InwardError) else _checked(kind, row) for row in rows]
    answers: dict[int, RowAnswer] = {}
    for shape in (PairItem, Item):
        alike = {i: row for i, row in enumerate(checked) if isinstance(row, shape)}
        if alike:
            found = await _score(services, kind, [*alike.values()], head, options, of_pairs=shape is PairItem)
            answers |= dict(zip(alike, found, strict=True))
    return [failed(row) if isinstance(row, InwardError) else answers[i] for i, row in enumerate(checked)]


async def token_scores(
    services: Services, pairs: Sequence[Row], *, head: str, options: ScoringOptions
) -> list[tuple[list[tuple[str, float]], list[tuple[str, float]]] | None]:
    """Of both answers of each pair the text of every token and the head's score at it; None where it has none."""
    asked = [_PAIR.validate_python(pair) for pair in pairs]
    grouped = await tokenise(services, None, asked, truncate=options.truncate)
    results = await score_each(services, None, asked, (head,), options, details=frozenset({"tokens"}), pair=True)
    found: list[tuple[list[tuple[str, float]], list[tuple[str, float]]] | None] = []
    for one, result in zip(grouped, results, strict=True):
        scores = result.scores()
        if isinstance(one, InwardError) or scores is None or scores.tokens_N is None:
            found.append(None)
            continue
        decode = services.prompts.tokenizer.decode
        chosen, rejected = (
            [(str(decode([token], skip_special_tokens=False)), score) for token, score in zip(ids, said, strict=False)]
            for ids, said in zip(one.group.responses_ids, scores.tokens_N, strict=True)
        )
        found.append((chosen, rejected))
    return found


def failed(error: InwardError) -> RowAnswer:
    """Of a row that has no score, and why."""
    return RowAnswer(Element(error=ErrorDetail(**error.body()["error"])))


def _checked(kind: RowsKind, row: Row) -> PairItem | Item | InwardError:
    shape: TypeAdapter[PairItem] | TypeAdapter[Item] = (
        _PAIR if kind == "margin" or (kind == "reward" and "chosen" in row) else _ITEM
    )
    try:
        return shape.validate_python(row)
    except ValidationError as error:
        return explain([{**problem, "loc": ("row", *problem["loc"])} for problem in error.errors()])


async def _score(
    services: Services,
    kind: RowsKind,
    some: Sequence[PairItem | Item],
    head: str | None,
    options: ScoringOptions | None,
    *,
    of_pairs: bool,
) -> list[RowAnswer]:
    found = find_head(services, head, KINDS[kind])
    heads = elements.with_confidence(services, found) if kind == "margin" else (found.name,)
    element = elements.margin if kind == "margin" else elements.reward_pair if of_pairs else elements.score
    results = await score_each(services, None, some, heads, options or ScoringOptions(), pair=of_pairs)
    return [_answer(result, element(result, None)) for result in results]


def _answer(result: Result, element: Element) -> RowAnswer:
    scored = result.outcome
    if not isinstance(scored, Scored):
        return RowAnswer(element)
    tokens = scored.usage.prompt_tokens + scored.usage.completion_tokens
    return RowAnswer(element, scored.heads[0], scored.policy_version, next(iter(scored.heads[1:]), None), tokens)
