"""Does each backbone read on a GPU what a plain forward pass reads? On a model of random weights and any shape.

    python tests/gpu/parity.py --shape 0.5b --backbone vllm --dtype bfloat16 --out OUT.json

Beside: transformers' own model in float32 on the same GPU, one text at a time. Read three ways: numbers of texts that
are given, whole states of the same, and numbers of texts that are drawn, in the pass that draws them. The error of a
number is its distance over the norms of state and weight; that of a state is the norm of the distance over its norm.
Beside ours stands the error of transformers in the same number format.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import inward
from inward.backbones.base import Backbone
from inward.types import Group, Readout, SamplingSpec, Tap

Floats = NDArray[np.float32]
SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TOKENIZER = Path(inward.__file__).parent / "models/smollm2/tokenizer"


def shaped(shape: str, folder: Path) -> Path:
    """The folder of a Llama of random weights, made where it is not there yet."""
    if not (folder / "model.safetensors").exists() and not (folder / "model.safetensors.index.json").exists():
        sizes = SHAPES[shape]
        config = LlamaConfig(
            **sizes,
            num_key_value_heads=2 if shape != "7b" else 32,
            vocab_size=49152,
            max_position_embeddings=8192,
            tie_word_embeddings=shape != "7b",
            initializer_range=0.05,
            bos_token_id=1,
            eos_token_id=2,
            dtype="bfloat16",
        )
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            model = LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
            if (TOKENIZER / name).exists():
                shutil.copy(TOKENIZER / name, folder / name)
    return folder


def adapted(folder: Path, out: Path) -> Path:
    """A LoRA adapter of random weights for it."""
    from peft import LoraConfig, get_peft_model

    if not (out / "adapter_model.safetensors").exists():
        torch.manual_seed(1)
        config = LoraConfig(r=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16"), config)
        model.save_pretrained(out)
    return out


def opened(name: str, folder: Path, dtype: str, options: dict[str, Any], adapters: bool) -> Backbone:
    if name == "vllm":
        from inward.backbones.vllm.backbone import VllmBackbone

        return VllmBackbone(folder, name="random", dtype=dtype, options=options, adapters=adapters)
    from inward.backbones.transformers.backbone import TransformersBackbone

    return TransformersBackbone(folder, name="random", dtype=dtype)


def groups(n: int) -> list[Group]:
    """Prompts of 20 to 300 tokens with four responses of 1 to 120."""
    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(100, 40000, rng.integers(low, high)))

    return [Group(text(20, 300), tuple(text(1, 120) for _ in range(4))) for _ in range(n)]


def weights(width: int, layers: int) -> list[Floats]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=(width, 2)).astype(np.float32) for _ in range(layers + 1)]


@torch.inference_mode()
def states(model: Any, group: Group) -> Floats:
    """``[N, P, D]``: the stream after each block at the last token of each response."""
    rows = []
    for response in group.responses_ids:
        ids = torch.tensor([group.prompt_ids + response], device=model.device)
        captured: list[torch.Tensor] = []
        hooks = [block.register_forward_hook(_keeping(captured)) for block in model.model.layers]
        embedded = model.model(ids).last_hidden_state
        for hook in hooks:
            hook.remove()
        rows.append(torch.stack([*captured, embedded[0, -1]]).float().cpu().numpy())
    return np.stack(rows)


def _keeping(captured: list[torch.Tensor]) -> Any:
    def keep(module: Any, given: Any, output: Any) -> None:
        captured.append((output[0] if isinstance(output, tuple) else output)[0, -1])

    return keep


def reference(folder: Path, dtype: str, asked: Sequence[Group], adapter: Path | None) -> list[Floats]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    found = [states(model, group) for group in asked]
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


async def run(args: argparse.Namespace) -> dict[str, Any]:
    folder = shaped(args.shape, args.folder / args.shape)
    began = time.perf_counter()
    options = json.loads(args.vllm_options)
    adapter = adapted(folder, args.folder / f"{args.shape}-lora") if args.lora else None
    backbone = await asyncio.to_thread(opened, args.backbone, folder, args.dtype, options, args.lora)
    report: dict[str, Any] = vars(args) | {"out": str(args.out), "folder": str(folder)}
    report["opened_s"] = time.perf_counter() - began
    engine = getattr(backbone, "_engine", None)
    report["compiled"] = engine.compiled if engine is not None else None
    L, D = backbone.info.layers, backbone.info.width
    asked, W = groups(args.groups), weights(D, L)
    places = [(k, False) for k in range(1, L + 1)] + [(L, True)]
    numbers = Readout(tuple(Tap(k, "last", w, final_norm=norm) for (k, norm), w in zip(places, W, strict=True)))
    whole = Readout(tuple(Tap(k, "last", final_norm=norm) for k, norm in places))
    drawing = [Group(g.prompt_ids, sampling=SamplingSpec(4, max_tokens=64, seed=i)) for i, g in enumerate(asked)]
    try:
        if adapter is not None:
            await backbone.load_adapter("v1", adapter)
        read = [r.readings[0].values_NK for r in await backbone.read(asked, [numbers])]
        if options.get("enable_sleep_mode"):
            await backbone.sleep()
            report["memory asleep"] = _free_gib()
            await backbone.wake()
            report["memory awake"] = _free_gib()
        again = [r.readings[0].values_NK for r in await backbone.read(asked, [numbers])]
        wide = [r.readings[0].values_NK.reshape(-1, L + 1, D) for r in await backbone.read(asked, [whole])]
        both = await asyncio.gather(*(backbone.sample_and_read(g, [numbers], tokens=True) for g in drawing))
        drawn = [
            Group(g.prompt_ids, tuple(s.ids for s in samples)) for g, (samples, _) in zip(drawing, both, strict=True)
        ]
        sampled = [reading.readings[0].values_NK for _, reading in both]
        fed = [r.readings[0].values_NK for r in await backbone.read(drawn, [numbers])]
    finally:
        await backbone.close()
    exact, plain = (reference(folder, dtype, asked, adapter) for dtype in ("float32", args.dtype))
    exact_drawn, plain_drawn = (reference(folder, dtype, drawn, adapter) for dtype in ("float32", args.dtype))

    def off(found: Sequence[Floats], true: Sequence[Floats]) -> dict[str, float]:
        """Of numbers."""
        errors = []
        for own, states_NPD in zip(found, true, strict=True):
            wanted = np.stack([states_NPD[:, p] @ w for p, w in enumerate(W)], axis=1).reshape(len(own), -1)
            size = np.stack(
                [
                    np.linalg.norm(states_NPD[:, p], axis=1, keepdims=True) * np.linalg.norm(w, axis=0)
                    for p, w in enumerate(W)
                ],
                axis=1,
            ).reshape(len(own), -1)
            errors.append((np.abs(own - wanted) / size).ravel())
        values = np.concatenate(errors)
        return {"worst": float(values.max()), "mean": float(values.mean()), "n": len(values)}

    def apart(found: Sequence[Floats], true: Sequence[Floats]) -> dict[str, float]:
        """Of states."""
        values = np.concatenate(
            [
                (np.linalg.norm(a - b, axis=2) / np.linalg.norm(b, axis=2)).ravel()
                for a, b in zip(found, true, strict=True)
            ]
        )
        return {"worst": float(values.max()), "mean": float(values.mean()), "n": len(values)}

    return report | {
        "numbers of given texts": off(read, exact),
        "numbers of given texts, again": off(again, exact),
        "numbers beside own states": off(read, wide),
        "numbers of drawn texts": off(sampled, exact_drawn),
        "numbers of drawn texts, given": off(fed, exact_drawn),
        "transformers, given texts": off([_mapped(s, W) for s in plain], exact),
        "transformers, drawn texts": off([_mapped(s, W) for s in plain_drawn], exact_drawn),
        "states of given texts": apart(wide, exact),
        "transformers' states of given texts": apart(plain, exact),
        "tokens drawn": sum(len(r) for g in drawn for r in g.responses_ids),
    }


def _free_gib() -> float | None:
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else None


def _mapped(states_NPD: Floats, W: Sequence[Floats]) -> Floats:
    return np.stack([states_NPD[:, p] @ w for p, w in enumerate(W)], axis=1).reshape(len(states_NPD), -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--backbone", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lora", action="store_true", help="with an adapter of random weights")
    parser.add_argument("--groups", type=int, default=50)
    parser.add_argument("--vllm-options", default="{}")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = asyncio.run(run(args))
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
