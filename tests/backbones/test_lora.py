"""Reading and sampling with an adapter, against PEFT's own forward."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inward.backbones.transformers.backbone import TransformersBackbone
from inward.errors import InvalidField
from inward.types import BASE, Floats, Group, Ids, Readout, SamplingSpec, Tap
from support.adapters import train_adapter, write_adapter
from support.tiny_models import LAYERS, WIDTH, random_group, save

READOUTS = [
    *(Readout((Tap(layer, "last"),)) for layer in range(LAYERS)),
    Readout((Tap(LAYERS, "last", final_norm=True),)),
]
RNG = np.random.default_rng(3)
GROUPS = [random_group(RNG, n) for n in (1, 3, 2)]


def opened(model: Path) -> TransformersBackbone:
    return TransformersBackbone(model, name="tiny", dtype="float32", device="cpu")


def states(backbone: TransformersBackbone) -> Floats:
    """``[all responses, layers + 1, D]``."""
    readings = asyncio.run(backbone.read(GROUPS, READOUTS))
    return np.concatenate([np.stack([r.values_NK for r in reading.readings], axis=1) for reading in readings])


def plain(model: Any) -> Floats:
    """The same by PEFT: text after text, ``output_hidden_states=True``."""
    texts: list[Ids] = [group.prompt_ids + ids for group in GROUPS for ids in group.responses_ids]
    with torch.inference_mode():
        hidden = [
            model.base_model.model.base_model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            for ids in texts
        ]
    return np.stack([np.stack([h[0, -1].numpy() for h in text]) for text in hidden])


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("gpt2", {"fan_in_fan_out": True}),
        ("gpt_neox", {}),
        ("bloom", {}),
    ],
    ids=["llama", "rslora", "patterns", "gpt2", "gpt_neox", "bloom"],
)
def test_states_equal_those_of_peft_and_without_the_adapter_those_of_the_base(
    kind: str, config: dict[str, Any], tmp_path: Path
) -> None:
    model = save(kind, tmp_path / "model")
    adapted = train_adapter(model, tmp_path / "v1", **config)
    backbone = opened(model)
    base = states(backbone)
    asyncio.run(backbone.load_adapter("v1", tmp_path / "v1"))
    carried, truth = states(backbone), plain(adapted)
    assert backbone.policy_version == "v1"
    assert np.abs(carried - truth).max() <= 2e-5 * np.abs(truth).max()
    assert np.abs(carried - base).max() > 0.05 * np.abs(truth).max()
    asyncio.run(backbone.load_adapter(BASE, None))
    np.testing.assert_array_equal(states(backbone), base)
    asyncio.run(backbone.close())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("lora") / "model")


@pytest.fixture
def backbone(model: Path) -> Any:
    backbone = opened(model)
    yield backbone
    asyncio.run(backbone.close())


def test_samples_are_drawn_with_the_adapter(model: Path, backbone: TransformersBackbone, tmp_path: Path) -> None:
    adapted = train_adapter(model, tmp_path / "v1")
    group = Group((5, 6, 7), sampling=SamplingSpec(2, max_tokens=12, temperature=0))
    before = asyncio.run(backbone.sample(group))
    asyncio.run(backbone.load_adapter("v1", tmp_path / "v1"))
    samples = asyncio.run(backbone.sample(group))
    drawn = adapted.generate(
        torch.tensor([group.prompt_ids]), do_sample=False, max_new_tokens=12, eos_token_id=2, pad_token_id=2
    )
    truth = drawn[0, 3:].tolist()
    assert samples[0].ids == tuple(truth[: truth.index(2) if 2 in truth else None])
    assert samples != before


def test_bfloat16_keeps_changes_that_would_be_lost_in_the_weights(model: Path, tmp_path: Path) -> None:
    train_adapter(model, tmp_path / "v1", size=0.01)  # 4 * 1e-4 on weights near 0.1: below half a unit of bfloat16
    exact, rounded = opened(model), TransformersBackbone(model, name="tiny", dtype="bfloat16", device="cpu")
    for backbone in (exact, rounded):
        backbone.change = -states(backbone)  # type: ignore[attr-defined]
        asyncio.run(backbone.load_adapter("v1", tmp_path / "v1"))
        backbone.change += states(backbone)  # type: ignore[attr-defined]
        asyncio.run(backbone.close())
    wanted, got = exact.change.ravel(), rounded.change.ravel()  # type: ignore[attr-defined]
    assert np.corrcoef(wanted, got)[0, 1] > 0.5


async def test_calls_in_flight_finish_with_the_version_with_which_they_began(
    model: Path, backbone: TransformersBackbone, tmp_path: Path
) -> None:
    for seed, version in enumerate(("v1", "v2")):
        train_adapter(model, tmp_path / version, seed=seed)
    drawing = Group((5, 6, 7), sampling=SamplingSpec(4, max_tokens=24, seed=1))
    alone: dict[str, Any] = {}
    for version in (BASE, "v1", "v2"):
        await backbone.load_adapter(version, None if version == BASE else tmp_path / version)
        alone[version] = await backbone.sample_and_read(drawing, READOUTS), await backbone.read(GROUPS, READOUTS)
    calls = []
    for version in ("v1", BASE, "v2", "v1"):
        await backbone.load_adapter(version, None if version == BASE else tmp_path / version)
        calls.append((version, asyncio.create_task(backbone.sample_and_read(drawing, READOUTS))))
        calls.append((version, asyncio.create_task(backbone.read(GROUPS, READOUTS))))
        await asyncio.sleep(0)  # both have begun
    for i, (version, call) in enumerate(calls):
        got, truth = await call, alone[version][i % 2]
        if i % 2 == 0:
            assert got[0] == truth[0]
            got, truth = [got[1]], [truth[1]]
        assert {reading.policy_version for reading in got} == {version}
        for one, other in zip(got, truth, strict=True):
            np.testing.assert_allclose(one.readings[2].values_NK, other.readings[2].values_NK, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_does_not_fit_is_refused_and_the_former_one_stays(
    model: Path, backbone: TransformersBackbone, tmp_path: Path
) -> None:
    train_adapter(model, tmp_path / "good")
    asyncio.run(backbone.load_adapter("good", tmp_path / "good"))
    before = states(backbone)

    def module(name: str, inputs: int = WIDTH, outputs: int = WIDTH) -> dict[str, tuple[int, int]]:
        return {
            f"base_model.model.{name}.lora_A.weight": (2, inputs),
            f"base_model.model.{name}.lora_B.weight": (outputs, 2),
        }

    refused = {
        "of another size": (module("model.layers.0.self_attn.q_proj", WIDTH * 2), "64 inputs"),
        "deeper": (module("model.layers.9.self_attn.q_proj"), "no such module"),
        "embedding": (module("model.embed_tokens"), "only linear"),
    }
    for name, (tensors, why) in refused.items():
        with pytest.raises(InvalidField, match=why):
            asyncio.run(backbone.load_adapter(name, write_adapter(tmp_path / name, tensors=tensors)))
    broken = train_adapter(model, tmp_path / "unused")
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if "lora_B" in n)[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    with pytest.raises(InvalidField, match="not finite"):
        asyncio.run(backbone.load_adapter("nan", tmp_path / "nan"))
    assert backbone.policy_version == "good"
    np.testing.assert_array_equal(states(backbone), before)
