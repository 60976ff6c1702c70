"""What all models share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Wire(BaseModel):
    """Base of our own models: frozen, descriptions from docstrings, nothing unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Lenient(BaseModel):
    """Base of models to which others, or newer versions, add fields: unknown ones are ignored."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)
