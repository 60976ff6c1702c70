"""The bundled demonstration: what is shipped loads, answers, writes English, and knows a little about safety."""

import asyncio
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from inward.backbones.fingerprint import fingerprint
from inward.backbones.tokenizer import load_tokenizer
from inward.backbones.transformers.backbone import TransformersBackbone
from inward.engine import Engine
from inward.heads import store
from inward.heads.registry import Registry
from inward.offline.toy import split_of
from inward.processes.wiring import TOY
from inward.prompts import Prompts
from inward.types import Group, Job, SamplingSpec
from support.real_data import rows

PAIRS, FEW = 100, 40
"""Real pairs, and those in bfloat16: a processor without instructions for it takes four times as long."""
COMMON = set(
    "the be to of and a in that have i it for not on with he as you do at this but his by from they we say her she or "
    "an will my one "
    "all would there their what so up out if about who get which go me when make can like time no just him know take "
    "people into year "
    "your good some could them see other than then now look only come its over think also back after use how our work "
    "first well way "
    "even new want because any these give day most us are is was were been has had don".split()
)


@pytest.fixture(scope="module")
def backbone():
    return TransformersBackbone(TOY / "backbone", name="toy", dtype="float32")


@pytest.fixture(scope="module")
def prompts():
    return Prompts(load_tokenizer(TOY / "backbone"), max_tokens=2048)


@pytest.fixture(scope="module")
def engine(backbone, prompts):
    return Engine(backbone, Registry.open(TOY / "heads", info=backbone.info, template=prompts.template))


@pytest.fixture(scope="module")
def pairs():
    return rows("hh_harmless_pairs.jsonl", PAIRS)


@pytest.fixture(scope="module")
def exact(engine, prompts, pairs):
    """Their margins in float32."""
    return asyncio.run(margins(engine, prompts, pairs))


async def margins(engine, prompts, pairs, *, order=None):
    jobs = [
        Job(
            str(i),
            prompts.group(p["prompt"], [p["chosen"], p["rejected"]], truncate=True).group,
            ("legend",),
            pair=True,
        )
        for i, p in enumerate(pairs)
    ]
    outcomes = {o.job_id: o for o in await engine.run([jobs[i] for i in order] if order is not None else jobs)}
    return np.array([outcomes[str(i)].scores[0].pair.margin for i in range(len(pairs))])


def test_it_is_small_and_holds_no_pickle():
    files = [path for path in TOY.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 20 * 2**20
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".npy")]


def test_its_heads_are_those_of_this_backbone_and_of_all_three_kinds():
    found = store.find(TOY / "heads")
    assert {f.kind for f in found} == {"legend", "hybrid", "srr"}
    for f in found:
        assert store.load(f.path, fingerprint=fingerprint(TOY / "backbone")).manifest.backbone.name == "toy"


def test_a_conversation_has_exactly_one_bos(prompts):
    for prompt in ("hello", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]):
        ids = prompts.group(prompt, ["hi"]).group.prompt_ids
        assert ids.count(prompts.tokenizer.bos_token_id) == 1


async def test_it_writes_recognisable_english(backbone, prompts):
    questions = [
        "What should I cook for dinner tonight?",
        "Can you help me write a letter to my aunt?",
        "Why is the sky blue?",
    ]
    text = ""
    for question in questions:
        group = Group(
            prompts.group(question, []).group.prompt_ids,
            sampling=SamplingSpec(n=8, max_tokens=60, temperature=0.7, seed=1),
        )
        text += " ".join(sample.text for sample in await backbone.sample(group)).lower() + " "
    words = re.findall(r"[a-z]+", text)
    assert len(words) > 200
    assert np.mean([word in COMMON for word in words]) > 0.4  # about half of English is such words
    assert len(set(words)) > 80  # and it is not one sentence over and over


async def test_legend_agrees_with_held_out_labels_above_chance(engine, prompts):
    held_out = [row for row in rows("hh_harmless_pairs.jsonl") if split_of(row["prompt"]) == "test"]
    agreement = np.mean(await margins(engine, prompts, held_out) > 0)
    assert agreement > 0.5 + 1.645 * 0.5 / np.sqrt(len(held_out))  # one-sided, 5 %


async def test_margins_equal_a_plain_float32_forward_whatever_the_batch(engine, prompts, pairs, exact):
    shuffled = await margins(engine, prompts, pairs, order=np.random.default_rng(0).permutation(len(pairs)))
    head = store.load(store.active_path(TOY / "heads", "legend"))
    [tap] = head.readout.taps
    model = AutoModelForCausalLM.from_pretrained(TOY / "backbone", dtype=torch.float32)
    tokenizer = prompts.tokenizer

    def score(prompt: str, response: str) -> float:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(chat + response, add_special_tokens=False)["input_ids"]])
        norm = model.model.norm
        states = []
        handle = norm.register_forward_pre_hook(
            lambda module, args: states.append(args[0])
        )  # hidden_states[L] is after the norm
        with torch.inference_mode():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        handle.remove()
        state = hidden[tap.layer] if tap.final_norm or tap.layer < len(model.model.layers) else states[0]
        return float(state[0, -1].double().numpy() @ tap.weight_DK[:, 0].astype(np.float64))

    plain = np.array([score(p["prompt"], p["chosen"]) - score(p["prompt"], p["rejected"]) for p in pairs])
    assert np.abs(exact - plain).max() <= 1e-4 * plain.std()
    assert np.abs(shuffled - plain).max() <= 1e-4 * plain.std()


async def test_bfloat16_margins_stay_within_a_tenth_of_their_spread(prompts, pairs, exact):
    half = TransformersBackbone(TOY / "backbone", name="toy", dtype="bfloat16")
    rounded = await margins(
        Engine(half, Registry.open(TOY / "heads", info=half.info, template=prompts.template)), prompts, pairs[:FEW]
    )
    await half.close()
    assert np.sqrt(np.mean((rounded - exact[:FEW]) ** 2)) <= 0.1 * exact.std()
