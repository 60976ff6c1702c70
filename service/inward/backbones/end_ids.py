"""The token ids that end a text of a model: its tokenizer, its configuration and its generation's each state some."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inward.errors import SetupError
from inward.types import Ids


def end_ids(tokenizer: Any, *configs: Mapping[str, Any]) -> Ids:
    """The ids that end a text: first the one that is appended for position ``eos``, then others at which generation
    stops too. Empty where none is known.

    Args:
        configs: what the model's configurations state, the more trusted first (``ending_configs`` reads them).
    """
    ids: dict[int, None] = {}
    for stated in (tokenizer.eos_token_id, *(config.get("eos_token_id") for config in configs)):
        for token in stated if isinstance(stated, list | tuple) else (stated,):
            if isinstance(token, int) and token >= 0:  # some configurations write -1 for none
                ids[token] = None
    return tuple(ids)


def ending_configs(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """What a model's files state about the ends of its texts: its (text) configuration, then its generation's.

    Raises:
        SetupError: a file cannot be read as JSON.
    """
    config = _stated(folder / "config.json")
    text = config.get("text_config")
    return (text if isinstance(text, dict) else {}, config, _stated(folder / "generation_config.json"))


def _stated(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SetupError(f"{file} cannot be read as JSON: {error}") from error
    return content if isinstance(content, dict) else {}
