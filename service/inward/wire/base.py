"""What all models share."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

CLOSE = 0.85
"""How alike an unknown field and one of ours are (``difflib``) before it is taken for a slip. Others' own names are
further off, the nearest (``top_a``) at 0.8, or go on where ours ends (``repetition_penalty_range``)."""

MOST_LOOKED_AT = 100
"""Unknown fields of one object that are compared, which takes some 0.1 ms each."""


class Wire(BaseModel):
    """Base of our own models: frozen, descriptions from docstrings, nothing unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Lenient(BaseModel):
    """Base of models to which others, or newer versions, add fields: unknown ones are ignored, except what can only be
    a misspelt one of ``OWN``, since what it asks for would be left out without a word.
    """

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)
    OWN: ClassVar[tuple[str, ...]] = ()
    """Fields of ours, which nobody else has a name like."""

    @model_validator(mode="before")
    @classmethod
    def _spelt(cls, value: Any) -> Any:
        if not cls.OWN or not isinstance(value, dict):
            return value
        unknown = [name for name in value if name.isascii() and name not in cls.model_fields]
        for name in unknown[:MOST_LOOKED_AT]:
            meant = get_close_matches(name.lower(), cls.OWN, n=1, cutoff=CLOSE)
            if meant and not name.startswith(f"{meant[0]}_"):  # which is a name of its own: repetition_penalty_range
                raise at(name, f"is not a field of this request; did you mean `{meant[0]}`?")
        return value


def at(field: str, problem: str) -> PydanticCustomError:
    """An error of a whole object that blames one of its fields."""
    return PydanticCustomError("wrong_form", "{problem}", {"problem": problem, "field": field})
