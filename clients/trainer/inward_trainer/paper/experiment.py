"""What several tables need: the model, the data, judges, heads, a reward model, draws. Each is made once, by whoever
needs it first, and kept in ``OUT/cells`` (numbers) or ``OUT/work`` (weights and texts, never to be passed on).
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import inward
from inward.backbones.device import choose_device
from inward.backbones.loading import resolve
from inward.errors import InwardError
from inward.heads import store
from inward.heads.hybrid import HybridHead
from inward.types import Doubles
from inward_client.rows import Prompt
from inward_trainer.durable import write_text
from inward_trainer.errors import OptionsError
from inward_trainer.models import load_tokenizer
from inward_trainer.options import PaperOptions
from inward_trainer.paper.bag_of_words import BagOfWords
from inward_trainer.paper.cells import Cells, Json
from inward_trainer.paper.classifier import Classifier, train_judge
from inward_trainer.paper.data import Data
from inward_trainer.paper.heads import fit_reward_head, layer_scores, pair_states, scores
from inward_trainer.paper.language_model import Drawn, LanguageModel, load_causal, reading_dtype
from inward_trainer.paper.reward_model import train_reward_model
from inward_trainer.paper.sizes import chosen
from inward_trainer.paper.texts import Text, encode, prompt_ids
from inward_trainer.tokens import Tokeniser

LOG = logging.getLogger(__name__)
TOY = Path(inward.__file__).parent / "models/toy/backbone"
JUDGE_SEED = 1234
"""Another one than any policy's."""
WORK = """\
Weights of judges, reward models and policies, and drawn texts. The judges come from data that may not be used for
anything that is shipped (CC-BY-NC-4.0), and the texts may be harmful: pass nothing of this folder on.
"""


class Experiment:
    """One run of ``inward-train paper``.

    Raises:
        OptionsError: no such model, device or data.
    """

    def __init__(self, options: PaperOptions) -> None:
        self.options = options
        self.seeds = options.seeds
        """Of the table that is being made: those of one that is there already stay."""
        self.device = _device(options.device)
        self.scale, self.sizes = chosen(options, self.device)
        self.data = Data.open(options.data, self.sizes)
        try:
            self.folder = resolve(str(TOY) if options.model == "toy" else options.model)
        except InwardError as error:
            raise OptionsError(f"--model: {error}") from error
        self.tokeniser = Tokeniser(load_tokenizer(self.folder))
        self.pad = int(self.tokeniser.tokenizer.pad_token_id)
        self.cells = Cells(options.out, options.minutes, _release)
        self.work = options.out / "work"
        write_text(self.work / "README", WORK)

    @cached_property
    def base(self) -> LanguageModel:
        """The model as it comes."""
        return LanguageModel.load(self.folder, self.tokeniser, self.device)

    @cached_property
    def judge(self) -> Classifier:
        """Trained on prompts that nothing else sees."""
        folder = self.work / "judge"
        self.cells.need("judge-weights", lambda: self._train_judge(folder))
        return Classifier.load(folder, self.pad, self.device)

    @cached_property
    def words(self) -> BagOfWords:
        """The other judge."""
        return BagOfWords(self.data.judge_train)

    @cached_property
    def head(self) -> HybridHead:
        """The reward: trained against in online runs."""
        return self._head("reward")

    @cached_property
    def monitor(self) -> HybridHead:
        """Fitted on other prompts, and never trained against."""
        return self._head("monitor")

    @cached_property
    def reward_model(self) -> Classifier:
        """Of the backbone's size, trained on the pairs that the reward head was fitted on."""
        folder = self.work / "reward-model"
        self.cells.need("reward-model", lambda: self._train_reward_model(folder))
        return Classifier.load(folder, self.pad, self.device)

    @cached_property
    def held_out(self) -> list[Prompt]:
        """All held-out prompts, source after source."""
        return [prompt for prompts in self.data.held_out.values() for prompt in prompts]

    @cached_property
    def asked(self) -> list[Prompt]:
        """Whatever a policy is asked when it is judged: held-out prompts, XSTest's (harmless, harmful), harmless
        instructions.
        """
        data = self.data
        return [*self.held_out, *data.xstest_safe, *data.xstest_unsafe, *data.harmless]

    def encoded(self, rows: Sequence[tuple[Prompt, str]]) -> list[Text]:
        return encode(self.tokeniser, rows)

    def drawn(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Drawn]]) -> list[Text]:
        """Drawn answers as they were drawn, prompt after prompt."""
        ids = prompt_ids(self.tokeniser, prompts)
        return [Text(before, one.ids) for before, row in zip(ids, answers, strict=True) for one in row]

    def base_draws(self, seed: int) -> list[list[Drawn]]:
        """``samples`` answers of the base model to each of ``asked``."""
        return self.draws(f"base-{seed}", self.base, self.asked, self.sizes.samples, 1_000 + seed)

    def draws(self, name: str, model: LanguageModel, prompts: Sequence[Prompt], n: int, seed: int) -> list[list[Drawn]]:
        """Kept under a name."""
        path = self.work / "draws" / f"{name}.json"

        def make() -> Json:
            found = model.draw(prompt_ids(self.tokeniser, prompts), n, self.sizes.tokens, seed)
            write_text(path, json.dumps(found))
            tokens = [len(one.ids) for row in found for one in row]
            return {"answers": len(tokens), "tokens": sum(tokens)}

        self.cells.need(f"draws-{name}", make)
        return [[Drawn(*one) for one in row] for row in json.loads(path.read_text("utf-8"))]

    def judged(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Drawn]]) -> tuple[Doubles, Doubles]:
        """Logits of the judge and of the bag of words, ``[P, n]`` each; positive is safe."""
        rows = [(prompt, one.text) for prompt, row in zip(prompts, answers, strict=True) for one in row]
        texts, shape = self.drawn(prompts, answers), (len(prompts), -1)
        return self.judge.scores(texts).reshape(shape), self.words.logits(rows).reshape(shape)

    def base_scores(self, seed: int) -> dict[str, Doubles]:
        """Of ``base_draws``, ``[P, n]`` each: logits of ``judge`` and ``words``, rewards of ``head``, ``monitor`` and
        ``reward_model``; and each layer's probe, ``layers`` ``[L, P, n]``.
        """

        def make() -> Json:
            drawn = self.base_draws(seed)
            texts = self.drawn(self.asked, drawn)
            states = self.base.states(texts)
            shape = (len(drawn), len(drawn[0]))
            return {
                "head": scores(self.head, states).reshape(shape).tolist(),
                "monitor": scores(self.monitor, states).reshape(shape).tolist(),
                "reward_model": self.reward_model.scores(texts).reshape(shape).tolist(),
                "layers": layer_scores(self.head, states).reshape(-1, *shape).round(4).tolist(),
            }

        found = self.cells.need(f"base-scores-{seed}", make)
        return self.base_judged(seed) | {name: np.array(value) for name, value in found.items() if name != "seconds"}

    def base_judged(self, seed: int) -> dict[str, Doubles]:
        """``judge`` and ``words`` of ``base_scores``, for which no head is needed."""

        def make() -> Json:
            drawn = self.base_draws(seed)
            judge, words = self.judged(self.asked, drawn)
            return {"judge": judge.tolist(), "words": words.tolist()}

        found = self.cells.need(f"base-judged-{seed}", make)
        return {name: np.array(found[name]) for name in ("judge", "words")}

    def train_draws(self, seed: int) -> list[list[Drawn]]:
        """``samples`` answers of the base model to each prompt that policies are aligned on."""
        return self.draws(f"train-{seed}", self.base, self.data.align_prompts, self.sizes.samples, 4_000 + seed)

    def prepare(self) -> None:
        """Makes what all ways to align need, each part by whichever process is free."""
        parts: dict[str, Callable[[], object]] = {
            f"base-draws-{seed}": partial(self.base_draws, seed) for seed in self.seeds
        }
        parts |= {f"train-draws-{seed}": partial(self.train_draws, seed) for seed in self.seeds}
        for name in ("head", "monitor", "reward_model", "judge"):
            parts[name] = partial(getattr, self, name)
        self.cells.share(parts, "prepare")

    def keep_policy(self, name: str, model: Any) -> None:
        """Writes the weights of a policy down, in the precision that it is read in."""
        path = self.work / "policies" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        dtype = reading_dtype(self.device)
        save_file({name: weight.detach().to(dtype).contiguous() for name, weight in model.named_parameters()}, path)

    def load_policy(self, name: str) -> LanguageModel:
        """What ``keep_policy`` wrote."""
        model = load_causal(self.folder, reading_dtype(self.device), self.device)
        kept: dict[str, Tensor] = load_file(self.work / "policies" / f"{name}.safetensors")
        model.load_state_dict(kept, strict=False)  # embeddings that are tied stand once
        return LanguageModel(model, self.tokeniser)

    def _train_judge(self, folder: Path) -> Json:
        rows = self.data.judge_train
        model = train_judge(
            self.folder,
            self.encoded([(row.prompt, row.text) for row in rows]),
            [row.safe for row in rows],
            pad=self.pad,
            device=self.device,
            epochs=self.sizes.judge_epochs,
            seed=JUDGE_SEED,
        )
        _save(model, folder, self.device)
        return {"rows": len(rows)}

    def _train_reward_model(self, folder: Path) -> Json:
        pairs = self.data.head_pairs
        found = train_reward_model(self.folder, self.tokeniser, pairs, device=self.device, seed=0)
        _save(found.model, folder, self.device)
        return {"pairs": len(pairs)}

    def _head(self, name: str) -> HybridHead:
        folder = self.work / "heads" / name
        self.cells.need(f"head-{name}", lambda: self._fit_head(name, folder))
        head = store.load(folder / "1")
        assert isinstance(head, HybridHead)
        return head

    def _fit_head(self, name: str, folder: Path) -> Json:
        pairs = self.data.head_pairs if name == "reward" else self.data.monitor_pairs
        head = fit_reward_head(pair_states(self.base, pairs), joint_steps=self.sizes.joint_steps)
        store.save(head, folder / "1", replace=True)
        metrics = head.manifest.fit["metrics"]
        return {name: metrics[name] for name in ("pairs", "prompts", "accuracy", "auc")}


def _save(model: Any, folder: Path, device: torch.device) -> None:
    model.to(reading_dtype(device)).save_pretrained(folder)


def _release() -> None:
    """Models and optimisers that nobody holds any more: other processes want the device's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _device(name: str) -> torch.device:
    try:
        return choose_device(name)
    except InwardError as error:
        raise OptionsError(str(error)) from None
