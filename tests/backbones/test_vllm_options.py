"""Which of vLLM's options may be set, and what is said of those that may not."""

from __future__ import annotations

from typing import Any

import pytest

from inward.backbones.vllm.options import checked
from inward.errors import SetupError


def test_what_only_changes_how_the_model_is_run_is_passed_on() -> None:
    options = {"tensor_parallel_size": 2, "quantization": "fp8", "max_model_len": 4096, "enforce_eager": True}
    assert checked(options) == options
    assert checked({"pipeline_parallel_size": 1}) == {"pipeline_parallel_size": 1}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("data_parallel_size", 2, "one worker for each"),
        ("prefill_context_parallel_size", 2, "a part of a text's tokens"),
        ("decode_context_parallel_size", 2, "a part of a text's tokens"),
        ("pipeline_parallel_size", 2, "only its own layers"),
        ("enable_dbo", True, "cuts a step in two"),
        ("ubatch_size", 2, "cuts a step in two"),
        ("speculative_config", {"method": "ngram"}, "speculative decoding"),
        ("spec_method", "ngram", "speculative decoding"),
        ("kv_transfer_config", {}, "bring no readouts"),
        ("compilation_config", {"mode": 3}, "enforce_eager turns compilation off"),
        ("worker_cls", "x", "own worker"),
        ("hf_overrides", {}, "config.json"),
        ("dtype", "float16", "--dtype"),
    ],
)
def test_what_readouts_would_not_survive_is_refused_with_the_reason(name: str, value: Any, reason: str) -> None:
    with pytest.raises(SetupError, match=rf"vllm_options\.{name} can't be set: .*{reason}"):
        checked({name: value})


def test_a_name_that_nobody_knows_gets_the_nearest_that_somebody_does() -> None:
    with pytest.raises(SetupError, match=r"max_model_length .*did you mean max_model_len\?"):
        checked({"max_model_length": 10})
    with pytest.raises(SetupError, match=r"those are: .*tensor_parallel_size"):
        checked({"zzz": 10})
