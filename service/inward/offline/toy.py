"""Trains the demonstration backbone: tokenizer, weights and held-out figures, from one file of preference pairs.

    python -m inward.offline.toy --pairs hh_harmless_pairs.jsonl --out service/inward/models/toy/backbone

The model is a Llama of about seven million parameters that reads prompt + answer and learns two things at once:

1. to continue the text (cross-entropy on every token of chosen *and* rejected answers, so that its samples vary in
   quality and best-of-N has something to choose from);
2. to tell the chosen from the rejected answer by one linear map of its last state (a Bradley-Terry loss on the pair).
   Seven million parameters trained on 1.2 MB of text would not find that distinction by language modelling alone. The
   map is thrown away after training; the bundled heads are fitted afterwards, by ``inward fit``, as for any other
   backbone.

Only permissively licensed pairs may go in here: the weights are shipped.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from inward.backbones.transformers import attention
from inward.backbones.transformers.attention import AttentionLayout
from inward.backbones.transformers.packing import Packed, pack
from inward.batching import within
from inward.types import Group

BOS, END, SYSTEM, USER, ASSISTANT, PAD = "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY, MAX_TOKENS = 4096, 2048
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class TokenPair:
    """One labelled pair, tokenised: the shared prompt and both answers, each answer ending in ``<|end|>``."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def split_of(prompt: str) -> str:
    """Which part a prompt belongs to: ``train`` (70 %), ``validation`` (15 %) or ``test`` (15 %).

    Decided by the first human turn alone, so that conversations which share their beginning stay on one side.
    """
    opening = prompt.split("\n\nAssistant:")[0].strip()
    bucket = int.from_bytes(hashlib.sha256(opening.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 70 else "validation" if bucket < 85 else "test"


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that adds one BOS by itself, as most causal language models' tokenizers do."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[BOS, END, SYSTEM, USER, ASSISTANT, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = MAX_TOKENS
    return tokenizer


def turns(transcript: str) -> list[dict[str, str]]:
    """A ``Human: … Assistant:`` transcript as chat messages, without the empty last assistant turn."""
    messages: list[dict[str, str]] = []
    for part in transcript.strip().removesuffix("Assistant:").strip().split("\n\n"):
        for marker, role in (("Human:", "user"), ("Assistant:", "assistant")):
            if part.startswith(marker):
                messages.append({"role": role, "content": part.removeprefix(marker).strip()})
                break
        else:
            if messages:
                messages[-1]["content"] += "\n\n" + part
    return messages


def tokenise(tokenizer: PreTrainedTokenizerFast, row: dict[str, str], *, as_chat: bool) -> TokenPair:
    """``as_chat`` parses the transcript into turns; otherwise it stands, whole, in one user turn (as a ``prompt``
    string is served).
    """
    messages = turns(row["prompt"]) if as_chat else [{"role": "user", "content": row["prompt"]}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    end = [tokenizer.eos_token_id]
    return TokenPair(ids(text), ids(row["chosen"].strip()) + end, ids(row["rejected"].strip()) + end)


def batches(pairs: Sequence[TokenPair], budget: int, rng: random.Random | None) -> Iterator[list[TokenPair]]:
    """Pairs in batches of about ``budget`` tokens; shuffled where ``rng`` is given."""
    order = list(pairs)
    if rng:
        rng.shuffle(order)
    yield from within(order, budget, lambda pair: pair.tokens)


def next_tokens(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a packed batch that predict a token, and the tokens: each prompt counts once, both answers follow its
    last token.
    """
    rows: list[int] = []
    targets: list[int] = []
    for segment in packed.segments:
        spans = [list(segment.prompt), *([segment.prompt[-1], *response] for response in segment.responses)]
        for span in spans:
            rows += span[:-1]
            targets += span[1:]
    return torch.tensor(rows), torch.from_numpy(packed.ids_T)[torch.tensor(targets)]


class Learner:
    """The model, the throw-away linear map, and the two losses."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int, smoothing: float, token_noise: float
    ) -> None:
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), head_dim=64,
                max_position_embeddings=MAX_TOKENS, tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        attention.register()
        self.model.set_attn_implementation(attention.SDPA)
        self.judge = torch.nn.Linear(width, 1, bias=False)
        torch.nn.init.zeros_(self.judge.weight)
        self.smoothing, self.token_noise = smoothing, token_noise

    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.model.parameters(), *self.judge.parameters()]

    def losses(self, batch: Sequence[TokenPair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cross-entropy per token, Bradley-Terry loss per pair, and the pairs' score differences ``[B]``.

        Packed as the service packs: a prompt is computed once for both answers.
        """
        packed = pack([Group(tuple(p.prompt), (tuple(p.chosen), tuple(p.rejected))) for p in batch])
        ids_T = torch.from_numpy(packed.ids_T)
        if self.model.training and self.token_noise:
            # tokens replaced at random: the one augmentation that text this small allows
            noisy_T = (torch.rand(ids_T.shape) < self.token_noise) & (ids_T > 5)
            ids_T = torch.where(noisy_T, torch.randint(6, self.model.config.vocab_size, ids_T.shape), ids_T)
        layout = AttentionLayout(packed.segments, torch.device("cpu"), torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16), attention.packed(layout):
            positions_T = torch.from_numpy(packed.positions_T)
            states_TD = self.model.model(
                input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False
            ).last_hidden_state[0]
            rows, targets = next_tokens(packed)
            logits_NV = self.model.lm_head(states_TD[rows])
        language = F.cross_entropy(logits_NV.float(), targets)
        # before END
        last_B = torch.tensor([response[-2] for segment in packed.segments for response in segment.responses])
        scores_B = self.judge(states_TD[last_B].float())[:, 0]
        difference_P = scores_B[0::2] - scores_B[1::2]
        # About a third of these labels are disputed: smoothing keeps the model from learning them by heart (zero
        # gradient at 70 %).
        pairwise = -(1 - self.smoothing) * F.logsigmoid(difference_P) - self.smoothing * F.logsigmoid(-difference_P)
        return language, pairwise.mean(), difference_P

    @torch.inference_mode()
    def judged(self, pairs: Sequence[TokenPair], budget: int) -> dict[str, float]:
        """Held-out perplexity per token and the share of pairs in which the chosen answer scores higher."""
        self.model.eval()
        language, weight, right = 0.0, 0, 0
        for batch in batches(pairs, budget, None):
            loss, _, difference_P = self.losses(batch)
            tokens = sum(p.tokens for p in batch)
            language += float(loss) * tokens
            weight += tokens
            right += int((difference_P > 0).sum())
        self.model.train()
        return {"perplexity": math.exp(language / weight), "pair_accuracy": right / len(pairs)}


def train(rows: Sequence[dict[str, str]], out: Path, args: argparse.Namespace) -> dict[str, object]:
    """Runs the whole recipe and writes the backbone to ``out``; returns the figures that go into the model card."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    parts = {name: [r for r in rows if split_of(r["prompt"]) == name] for name in PARTS}
    tokenizer = train_tokenizer([r[k] for r in parts["train"] for k in ("prompt", "chosen", "rejected")])
    # Both shapes in which a conversation may be served: as turns, and as one string in a user turn.
    shapes = [[tokenise(tokenizer, r, as_chat=chat) for r in parts["train"]] for chat in (False, True)]
    held_out = {name: [tokenise(tokenizer, r, as_chat=False) for r in parts[name]] for name in ("validation", "test")}
    learner = Learner(
        tokenizer, width=args.width, layers=args.layers, smoothing=args.smoothing, token_noise=args.token_noise
    )
    decay = [p for p in learner.parameters() if p.dim() > 1]
    rest = [p for p in learner.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    epochs = [[rng.choice(pair) for pair in zip(*shapes, strict=True)] for _ in range(args.epochs)]
    plan = [list(batches([p for p in epoch if p.tokens <= MAX_TOKENS], args.budget, rng)) for epoch in epochs]
    total, step = sum(map(len, plan)), 0
    best: tuple[float, dict[str, torch.Tensor]] = (math.inf, {})
    history = []
    with tqdm(total=total, unit="step") as bar:
        for epoch, steps in enumerate(plan):
            for batch in steps:
                cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / total))
                scale = min(1.0, (step + 1) / args.warm_up) * cosine
                for group in optimiser.param_groups:
                    group["lr"] = args.lr * scale
                language, pairwise, _ = learner.losses(batch)
                (language + args.pair_weight * pairwise).backward()
                torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
                step += 1
                bar.update()
                bar.set_postfix(loss=f"{float(language):.3f}", pair=f"{float(pairwise):.3f}")
            found = learner.judged(held_out["validation"], args.budget)
            history.append({"epoch": epoch + 1, **found})
            tqdm.write(json.dumps(history[-1]))
            # One unit of log-perplexity is worth as much as one of log-odds of being right: both purposes count.
            right = found["pair_accuracy"]
            merit = math.log(found["perplexity"]) - args.pair_weight * math.log(right / (1 - right))
            if merit < best[0]:
                best = (merit, copy.deepcopy(learner.model.state_dict()))
    learner.model.load_state_dict(best[1])
    pairs = {name: len(part) for name, part in parts.items()}
    figures = {"pairs": pairs, "validation": history, "seed": args.seed, "epochs": args.epochs}
    learner.model.set_attn_implementation("sdpa")
    learner.model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--pairs", type=Path, required=True, help="JSONL with prompt, chosen, rejected (permissively licensed)")
    add("--out", type=Path, required=True, help="folder for config, weights (bf16 safetensors) and tokenizer")
    add("--splits", type=Path, help="folder for the parts that the pairs were split into, as JSONL")
    add("--epochs", type=int, default=9)
    add("--width", type=int, default=256)
    add("--layers", type=int, default=8)
    add("--budget", type=int, default=4096, help="tokens in a batch")
    add("--lr", type=float, default=1.5e-3)
    add("--warm-up", type=int, default=60, help="steps")
    add("--weight-decay", type=float, default=0.1)
    add("--pair-weight", type=float, default=0.3, help="weight of the pair loss beside the language loss")
    add("--smoothing", type=float, default=0.3, help="of the pairs' labels")
    add("--token-noise", type=float, default=0.15, help="share of input tokens replaced at random")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines()]
    if args.splits:
        args.splits.mkdir(parents=True, exist_ok=True)
        for name in PARTS:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows if split_of(row["prompt"]) == name]
            (args.splits / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(json.dumps(train(rows, args.out, args), indent=1))


if __name__ == "__main__":
    main()
