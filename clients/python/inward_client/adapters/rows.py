"""Rows and samples in the forms that trainers have, as the service takes them; ``inward_client.rows`` reads them.

What can't be read is a ``ValueError`` that says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inward_client.rows import read_item, read_pair


def item(prompt: Any, completion: Any) -> dict[str, Any]:
    """A prompt and its completion, each a text or a list of messages, for ``score`` and ``reward``.

    Raises:
        ValueError: the completion does not end with a message of the assistant, or something in it is no text.
    """
    asked, response = read_item(prompt, completion)
    return {"prompt": asked, "response": response}


def pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a preference dataset in any layout, for ``margin`` and ``reward_pairs``.

    Raises:
        ValueError: there is no prompt, the two answers have different ones, or something is no text.
    """
    return read_pair(row).body()
