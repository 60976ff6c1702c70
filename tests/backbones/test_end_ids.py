"""Which ids end a text, as the files of a model state it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inward.backbones.end_ids import end_ids, ending_configs
from inward.errors import SetupError


@pytest.mark.parametrize(
    ("tokenizer", "config", "generation", "expected"),
    [
        (2, {"eos_token_id": 2}, {"eos_token_id": [2, 7]}, (2, 7)),  # the appended one is the tokenizer's
        (7, {"eos_token_id": 2}, {"eos_token_id": [1, 2, 7]}, (7, 2, 1)),
        (None, {"eos_token_id": [4, 5]}, {}, (4, 5)),
        (None, {"text_config": {"eos_token_id": 9}, "eos_token_id": 3}, {}, (9, 3)),
        (None, {"eos_token_id": None}, {"eos_token_id": -1}, ()),
        (0, {}, {}, (0,)),
    ],
)
def test_the_tokenizers_eos_comes_first_and_every_other_that_is_stated_follows(
    tokenizer: int | None,
    config: dict[str, Any],
    generation: dict[str, Any],
    expected: tuple[int, ...],
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_ids(SimpleNamespace(eos_token_id=tokenizer), *ending_configs(tmp_path)) == expected


def test_a_folder_without_configurations_states_nothing_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert end_ids(SimpleNamespace(eos_token_id=2), *ending_configs(tmp_path)) == (2,)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(SetupError, match=r"generation_config\.json"):
        ending_configs(tmp_path)
