"""JSON of other projects' clients: only the fields that are used here; whatever else they send is ignored.

What ``/rerank`` and ``/score`` take in several dialects is told by the fields present. Answers are in
``wire.compat_answers``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, StrictInt, Tag

from inward.errors import InvalidField
from inward.wire.base import Lenient
from inward.wire.requests import RerankRequest, ScoreRequest, Text

HeadName = Annotated[str, Field(min_length=1, max_length=64)]
Texts = Annotated[list[Text], Field(min_length=1)]
Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]
COMPAT_TAGS = frozenset(
    {"as native", "as documents", "as texts", "as text pairs", "as one", "as many", "as object", "as parts"}
)
"""Steps in the path of a pydantic error that are no field of the caller's JSON."""


def _one_or_many(value: Any) -> str:
    return "as many" if isinstance(value, list) else "as one"


TextOrTexts = Annotated[Annotated[Text, Tag("as one")] | Annotated[Texts, Tag("as many")], Discriminator(_one_or_many)]
TextOrMessages = Annotated[
    Annotated[Text, Tag("as one")] | Annotated[Messages, Tag("as many")], Discriminator(_one_or_many)
]


class CompatRequest(Lenient):
    """Base of all: unknown fields are ignored."""

    head: HeadName | None = None
    """Inward's own: the head that answers. Without it: `model`, if it is a head's name, then the setting
    `compat_head`, then the first loaded one of a kind that fits."""
    truncate: StrictBool | None = None
    """Cut text that is longer than the model takes."""


class ModelRequest(CompatRequest):
    """With the `model` that nearly every client sends."""

    model: str | None = None
    """Name of a head, or of anything."""


class OpenRLHFRequest(CompatRequest):
    """OpenRLHF's remote reward model: whole conversations, decoded with special tokens."""

    query: list[Text]
    """Prompt and response, as the model saw and wrote them."""
    prompts: list[Text] | None = None
    """The prompts with which the queries begin."""
    labels: list[Any] | None = None


class SlimeRequest(CompatRequest):
    """slime's and miles' remote reward model: one sample."""

    prompt: TextOrMessages
    """As text, with the chat template applied or not, or as chat messages."""
    response: Text
    label: Any = None


class LlamaFactoryRequest(ModelRequest):
    """LLaMA-Factory's reward model server: whole conversations, decoded with special tokens."""

    messages: Texts


class ClassifyRequest(ModelRequest):
    """vLLM's `/classify`, as verl calls it: whole conversations with the chat template applied."""

    input: TextOrTexts
    use_activation: StrictBool | None = None
    """false: the raw score instead of one in [0, 1]."""


class DocumentText(Lenient):
    """A document as an object."""

    text: Text


Document = Annotated[
    Annotated[Text, Tag("as one")] | Annotated[DocumentText, Tag("as object")],
    Discriminator(lambda value: "as object" if isinstance(value, dict | DocumentText) else "as one"),
]


class DocumentsRequest(ModelRequest):
    """Rerank as Cohere, Jina and vLLM ask for it: the query is the prompt, the documents are the responses."""

    query: Text
    documents: Annotated[list[Document], Field(min_length=1)]
    top_n: Annotated[StrictInt, Field(ge=0)] | None = None
    """How many to answer; 0 and none: all."""
    return_documents: StrictBool | None = None
    truncate_prompt_tokens: StrictInt | None = None
    """vLLM's; given, text that is longer than the model takes is cut."""

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class TextsRequest(CompatRequest):
    """Rerank as text-embeddings-inference asks for it."""

    query: Text
    texts: Texts
    raw_scores: StrictBool | None = None
    """Scores as they are instead of in [0, 1]."""
    return_text: StrictBool | None = None


class TextPairsRequest(ModelRequest):
    """vLLM's `/score`: each query with each text, or the n-th with the n-th."""

    text_1: TextOrTexts | None = None
    text_2: TextOrTexts | None = None
    queries: TextOrTexts | None = None
    """Another name of `text_1`."""
    documents: TextOrTexts | None = None
    """Another name of `text_2`."""
    use_activation: StrictBool | None = None
    """false: the raw score instead of one in [0, 1]."""
    truncate_prompt_tokens: StrictInt | None = None
    """Given, text that is longer than the model takes is cut."""


class VerifyRequest(BaseModel):
    """NeMo Gym's verification of one rollout. All of it is sent back with the reward."""

    model_config = ConfigDict(extra="allow")

    responses_create_params: dict[str, Any]
    """What was asked of the policy: `input`, `instructions`."""
    response: dict[str, Any]
    """What it answered, as an object of the Responses API."""


TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
"""Types of the parts of a message's content that are text."""
OF_TEXT = TEXT_PARTS | {"refusal"}
"""And of what was said instead."""
CALLS = ("tool_calls", "function_call")
"""Fields of a message that hold calls of tools."""
UNSAID = ("reasoning_content", "reasoning", "thinking", "audio", "images")
"""Fields of a message that hold something else than what was said; one that has nothing else is no empty answer."""


def message(turn: dict[str, Any], where: str) -> dict[str, str]:
    """A chat message, which came at ``where``, as its role and text.

    Raises:
        InvalidField: names what is there that is no text, such as a tool call.
    """
    if not isinstance(turn.get("role"), str):
        raise InvalidField(f"{where}.role is missing", param=f"{where}.role")
    for calls in CALLS:
        if turn.get(calls):
            raise InvalidField(f"{where}.{calls} is no text and can't be scored", param=f"{where}.{calls}")
    content = turn.get("content")
    if not content and isinstance(turn.get("refusal"), str):
        content = turn["refusal"]
    if content == "" and (unsaid := next((name for name in UNSAID if turn.get(name)), None)):
        raise InvalidField(
            f"{where}.content is empty beside {unsaid!r}: there is no text to score", param=f"{where}.content"
        )
    return {"role": turn["role"], "content": text_of(content, f"{where}.content")}


def texts_of(turn: dict[str, Any]) -> dict[str, Any]:
    """A chat message without what is no text, images and tool calls, be there any text left or none."""
    content, calls = turn.get("content"), any(turn.get(calls) for calls in CALLS)
    if isinstance(content, list):
        content = [part for part in content if not isinstance(part, dict) or part.get("type", "text") in OF_TEXT]
    kept = {name: turn[name] for name in ("role", "refusal") if name in turn}
    silent = calls or turn.get("content") or turn.get("role") in ("tool", "function")
    return kept | {"content": content or ("" if silent else content)}


def conversation(given: str | list[dict[str, Any]], field: str) -> str | list[dict[str, str]]:
    """A text as it is, or chat messages, which came in ``field``, as their roles and texts. Raises as ``message``."""
    return given if isinstance(given, str) else [message(turn, f"{field}.{i}") for i, turn in enumerate(given)]


def text_of(content: Any, where: str) -> str:
    """The text of a message's content: a string, or its parts put together; a refusal is what it says.

    Raises:
        InvalidField: names what is no text. It must not be scored as an empty answer.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        what = "null" if content is None else "empty" if content == [] else "neither a string nor parts of text"
        raise InvalidField(f"{where} is {what}: there is no text to score", param=where)
    return "".join(_part(part, f"{where}.{i}") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if isinstance(part, dict):
        said = part.get("refusal") if kind == "refusal" else part.get("text") if kind in TEXT_PARTS else None
        if isinstance(said, str):
            return said
    raise InvalidField(f"{where} is of type {kind!r}, which is no text and can't be scored", param=where)


def rerank_dialect(value: Any) -> str:
    """The tag of the dialect in which a body on ``/rerank`` is written."""
    given = value if isinstance(value, dict) else {}
    return "as documents" if "documents" in given else "as texts" if "texts" in given else "as native"


def score_dialect(value: Any) -> str:
    """The tag of the dialect in which a body on ``/score`` is written."""
    given = value if isinstance(value, dict) else {}
    return "as text pairs" if "text_1" in given or "queries" in given else "as native"


AnyRerank = Annotated[
    Annotated[RerankRequest, Tag("as native")]
    | Annotated[DocumentsRequest, Tag("as documents")]
    | Annotated[TextsRequest, Tag("as texts")],
    Discriminator(rerank_dialect),
]
"""What `/rerank` takes: the fields present decide."""
AnyScore = Annotated[
    Annotated[ScoreRequest, Tag("as native")] | Annotated[TextPairsRequest, Tag("as text pairs")],
    Discriminator(score_dialect),
]
"""What `/score` takes: the fields present decide."""
