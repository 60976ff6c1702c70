"""Which device a model runs on: one that is not there is refused in words."""

from __future__ import annotations

import pytest
import torch

from inward.__main__ import main
from inward.backbones.device import choose_device
from inward.errors import SetupError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine with so many."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize(
    ("gpus", "device", "chosen"),
    [(0, "auto", "cpu"), (2, "auto", "cuda"), (2, "cpu", "cpu"), (2, "cuda", "cuda"), (2, "cuda:1", "cuda:1")],
    indirect=["gpus"],
)
def test_a_device_that_is_there_is_taken(gpus: None, device: str, chosen: str) -> None:
    assert choose_device(device) == torch.device(chosen)


@pytest.mark.parametrize(
    ("gpus", "device"),
    [(0, "cuda"), (2, "cuda:2"), (2, "gpu"), (2, "0"), (2, "cuda:x"), (2, "meta"), (2, "hpu"), (2, "vulkan")],
    indirect=["gpus"],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_may_be(gpus: None, device: str) -> None:
    with pytest.raises(SetupError, match=f"^--device {device}: there is no such device here.*take auto, cpu"):
        choose_device(device)


@pytest.mark.parametrize("command", ["serve", "evaluate --head hybrid --pairs pairs.jsonl"])
def test_a_command_says_so_in_one_line(command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    words = [*command.split(), "--model", "toy", "--backbone", "transformers", "--device", "gpu"]
    assert main(words + (["--port", "0"] if command == "serve" else [])) == 2
    assert "--device gpu: there is no such device here" in capsys.readouterr().err
