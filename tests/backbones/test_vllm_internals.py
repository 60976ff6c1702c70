"""What is said at start-up of a vLLM that lacks a name, or that was not tried."""

from __future__ import annotations

import logging
from importlib import metadata

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm does it", exc_type=ImportError)

from inward.backbones.vllm import internals
from inward.errors import SetupError


def test_this_vllm_has_every_name() -> None:
    internals.check()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(internals.NAMES, "tokens_input", "vllm.inputs.no_such_function")
    monkeypatch.setitem(internals.FIELDS, "vllm.forward_context.ForwardContext", "slot_mapping no_such_field")
    monkeypatch.setattr(internals, "METHODS", "load_model no_such_method")
    with pytest.raises(SetupError) as refused:
        internals.check()
    for name in ("vllm.inputs.no_such_function", "ForwardContext.no_such_field", "CPUWorker.no_such_method"):
        assert name in refused.value.message
    assert "from 0.26 to 0.33" in refused.value.message


@pytest.mark.parametrize(
    ("version", "warned"),
    [("0.32.0", False), ("0.26.0", False), ("0.32.1+cpu", False), ("0.29.0", True), ("1.0", True)],
)
def test_a_version_that_was_not_tried_is_told_and_goes_on(
    version: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with caplog.at_level(logging.WARNING, "inward"):
        internals.check()
    assert ("was not tried" in caplog.text) is warned


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        internals.no_such_name  # noqa: B018
