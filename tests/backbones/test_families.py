"""Sixty and more model families, each a tiny random model: read and drawn as the plain eager forward computes, in
float32, or refused by name when loaded.
"""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from inward.backbones.transformers.backbone import TransformersBackbone
from inward.backbones.transformers.model import load_model
from inward.errors import InvalidField, SetupError
from inward.types import Group, Readout, SamplingSpec, Tap
from support.families import Eager, relative_error, save
from support.tiny_models import LAYERS, WIDTH, save_tokenizer

TOLERANCE = 1e-4
MLA = {"num_key_value_heads": 4}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
CONVOLVED = {"layer_types": ["conv", "full_attention", "conv"]}
MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
DECODER = {"decoder_layers": LAYERS, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}

PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    # whose caches can be joined, too
    **dict.fromkeys(
        (
            *("llama", "gemma", "phi", "olmo", "olmo2", "olmoe", "cohere", "gpt2", "gpt_bigcode", "gpt_neox", "opt"),
            *("apertus", "arcee", "aria_text", "biogpt", "bitnet", "ctrl", "diffllama", "dots1", "ernie4_5"),
            *("ernie4_5_moe", "flex_olmo", "glm", "glm4", "glm4_moe", "granite", "granitemoe", "granitemoeshared"),
            *("helium", "hunyuan_v1_dense", "jetmoe", "ministral3", "mixtral", "minimax_m2", "nanochat", "nemotron"),
            *("persimmon", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3"),
            *("stablelm", "starcoder2"),
        ),
        ("shared", {}),
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3"), ("shared", MLA)),
    # with a window, whose caches can only be repeated; a soft cap; learned sinks
    **dict.fromkeys(("mistral", "ministral"), ("repeated", {})),
    **dict.fromkeys(("cohere2", "exaone4", "gemma3_text", "olmo3"), ("repeated", {"layer_types": SLIDING})),
    **dict.fromkeys(("gemma2", "vaultgemma"), ("repeated", {"attn_logit_softcapping": 2.0})),
    **dict.fromkeys(("gpt_oss", "granite_swa"), ("repeated", {})),
}
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    # attention of their own
    **dict.fromkeys(("bloom", "mpt", "gpt_neox_japanese", "xglm", "doge"), ("shared", {})),
    **dict.fromkeys(("gptj", "codegen"), ("shared", {"rotary_dim": 4})),
    "falcon": ("shared", {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "gpt_neo": ("shared", {"attention_types": [[["global", "local", "global"], 1]], "window_size": 6, "num_heads": 4}),
    "llama4_text": ("repeated", {}),
    "deepseek_v32": ("repeated", MLA),
    "bart": ("repeated", DECODER),
    # a state beside or instead of keys and values, which can't be repeated
    **dict.fromkeys(("lfm2", "lfm2_moe"), ("alone", CONVOLVED)),
    **dict.fromkeys(("qwen3_next", "olmo_hybrid"), ("alone", MIXED)),
    **dict.fromkeys(("rwkv", "mamba", "falcon_mamba"), ("alone", {})),
    "mamba2": ("alone", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "jamba": ("alone", {"attn_layer_offset": 1, "attn_layer_period": 2}),
    "granitemoehybrid": ("alone", {"layer_types": ["mamba", "attention", "mamba"]}),
    # no cache with which a text could be continued as it is computed whole
    "minimax": ("none", MIXED),
    **dict.fromkeys(("recurrent_gemma", "openai-gpt"), ("none", {})),
    # read in both directions
    **dict.fromkeys(("bert", "roberta", "electra"), ("none", {})),
}
PACKED_SINCE_5_24 = {"gptj", "codegen"}
"""They attend through transformers' interface since then."""
ENCODERS = {"bert", "roberta", "electra"}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n_text": (
        r"Gemma3nTextModel .* passes \[4, 1, 6, 32\] on before block 1",
        {
            **{"layer_types": SLIDING[::-1], "num_kv_shared_layers": 0, "laurel_rank": 4},
            **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
            **{"activation_sparsity_pattern": [0.0] * LAYERS},
        },
    ),
    "deepseek_v4": (r"DeepseekV4Model .* one residual stream of \[1, 6, 32\] was expected", {}),
    "xlnet": (r"XLNetModel .* passes \[6, 1, 32\]", {"max_position_embeddings": "left out"}),
    "xlm": (r"what XLMModel .* is not its residual stream", {}),
    "hrm_text": (r"HrmTextModel .* has no list of 24 blocks", {}),
}
PROMPT, RESPONSES = (5, 6, 7, 8, 9), ((10, 11, 12), (13,), (14, 15, 16, 17, 18, 19, 20, 21), ())
GROUPS = [Group(PROMPT, RESPONSES), Group((30, 31), ((32, 33, 34, 35, 36, 37, 38, 39, 40),))]


def open_backbone(folder: Path) -> TransformersBackbone:
    return TransformersBackbone(folder, name=folder.name, dtype="float32", device="cpu")


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    kind = request.getfixturevalue("kind")
    more = (PACKED | PADDED)[kind][1]
    return save(kind, tmp_path / kind, encoder=kind in ENCODERS, **more)


@pytest.mark.parametrize("kind", sorted(PACKED | PADDED))
def test_states_and_greedy_drawings_are_those_of_the_plain_eager_forward(kind: str, folder: Path) -> None:
    caching, _ = (PACKED | PADDED)[kind]
    reference = Eager(folder, encoder=kind in ENCODERS)
    backbone = open_backbone(folder)
    modes = {"packed"} if kind in PACKED else {"padded"}
    if kind in PACKED_SINCE_5_24:
        modes.add("packed")
    assert backbone.mode in modes and backbone.caching == caching
    asyncio.run(everything_agrees(backbone, reference, draws=kind not in ENCODERS))


async def everything_agrees(backbone: TransformersBackbone, reference: Eager, *, draws: bool) -> None:
    taps = [*(Tap(k, "last") for k in range(LAYERS + 1)), Tap(2, "mean"), Tap(LAYERS, "last", final_norm=True)]
    for group, result in zip(GROUPS, await backbone.read(GROUPS, [Readout((tap,)) for tap in taps]), strict=True):
        for i, response in enumerate(group.responses_ids):
            states, end = reference.states(group.prompt_ids + response)
            assert end is not None
            mean = states[2][len(group.prompt_ids) :].mean(axis=0) if response else states[2][-1]
            for reading, truth in zip(result.readings, [*(s[-1] for s in states), mean, end[-1]], strict=True):
                assert relative_error(reading.values_NK[i], truth) <= TOLERANCE
    if draws:
        spec = SamplingSpec(2, max_tokens=5, temperature=0)
        samples = await backbone.sample(Group(PROMPT, sampling=spec))
        assert [sample.ids for sample in samples] == [reference.greedy(PROMPT, 5)] * 2
    await backbone.close()


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_is_no_residual_stream_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    message, more = REFUSED[kind]
    with pytest.raises(SetupError, match=message):
        load_model(save(kind, tmp_path / kind, **more), "float32", "cpu")


def test_a_final_norm_of_another_width_is_refused_and_everything_else_is_read(tmp_path: Path) -> None:
    """As in OPT-350m, whose blocks are wider than its embeddings."""
    folder = save("opt", tmp_path / "opt-350m", word_embed_proj_dim=16, do_layer_norm_before=False)
    backbone, reference = open_backbone(folder), Eager(folder)
    assert not backbone.info.final_norm
    (result,) = asyncio.run(backbone.read(GROUPS[:1], [Readout((Tap(LAYERS, "last"),))]))
    truth = reference.states(PROMPT + RESPONSES[0])[0][LAYERS][-1]
    assert relative_error(result.readings[0].values_NK[0], truth) <= TOLERANCE
    with pytest.raises(InvalidField, match=r"opt-350m .*final norm"):
        asyncio.run(backbone.read(GROUPS[:1], [Readout((Tap(LAYERS, "last", final_norm=True),))]))


def test_the_text_blocks_are_found_beside_a_vision_tower_of_the_same_depth(tmp_path: Path) -> None:
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        eos_token_id=2,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(0)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=63)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    backbone = open_backbone(save_tokenizer(tmp_path))
    assert backbone.info.width == WIDTH
    taps = [Tap(k, "last") for k in range(LAYERS + 1)]
    (result,) = asyncio.run(backbone.read(GROUPS[:1], [Readout((tap,)) for tap in taps]))
    whole = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden = whole(torch.tensor([PROMPT + RESPONSES[0]]), output_hidden_states=True).hidden_states
    for k in range(LAYERS):  # the last one is reported after the final norm
        truth = hidden[k][0, -1].numpy()
        assert relative_error(result.readings[k].values_NK[0], truth) <= TOLERANCE


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "mistral"])
def test_bfloat16_weights_are_checked_in_float32_and_left_as_they_were(kind: str, folder: Path) -> None:
    backbone = TransformersBackbone(folder, name=kind, dtype="bfloat16", device="cpu")
    assert backbone.mode == "packed"
    stored = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    for name, tensor in backbone._model.whole.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, stored[name])


def test_a_kernel_that_leaves_the_soft_cap_out_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("inward.backbones.transformers.attention._asked", lambda kwargs: set())
    monkeypatch.setattr(
        "inward.backbones.transformers.attention._Rule._eager", lambda rule, q, k, v, mask: q.new_zeros(q.shape)
    )
    with caplog.at_level(logging.INFO, "inward"):
        folder = save("gemma2", tmp_path / "gemma2", attn_logit_softcapping=50.0)
        assert open_backbone(folder).mode == "padded"
    refused = "(states after block 1 differ|ValueError: `sdpa` attention does not support)"  # since transformers 5.24
    assert re.search(f"padded reading with attention inward_packed is not used: {refused}", caplog.text)
