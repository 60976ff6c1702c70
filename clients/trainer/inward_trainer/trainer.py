"""TRL's DPOTrainer with a confidence per pair.

TRL 1.16 ignores ``label_smoothing`` for its ``sigmoid`` loss without a word, and knows no confidence per row. So the
loss is ours; model, reference, dataset, checkpoints and distribution stay TRL's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import use_adapter

from inward_trainer.losses import cdpo_loss

COLUMN = "confidence"
SCORES = ("chosen_score", "rejected_score", "monitor_chosen", "monitor_rejected")
"""Columns that are only logged; a row may lack them."""


class ConfidenceCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's collator, and each row's confidence (1 where a row has none) and scores (NaN where it has none)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        batch[COLUMN] = torch.tensor([float(example.get(COLUMN, 1.0)) for example in examples])
        for name in SCORES:
            values = [example.get(name) for example in examples]
            batch[name] = torch.tensor([float("nan") if value is None else float(value) for value in values])
        return batch


class CdpoTrainer(DPOTrainer):  # type: ignore[misc]
    """Takes a dataset as DPOTrainer does, with a column ``confidence`` besides; rows without one train as in plain DPO.

    Logged beside TRL's ``rewards/…``: ``gamma`` (mean confidence), ``log_ratio`` (of policy to reference, the mean of
    the batch's answers in nats each; no KL, since best and worst of some samples are no draws), and of rows that carry
    scores ``hybrid/accuracy``, ``monitor/accuracy`` and ``hybrid/reward/*``, the distribution of rewards.

    Raises:
        ValueError: options of DPOConfig that this loss does not know, which would be ignored in silence.
    """

    _tag_names = ["trl", "cdpo"]  # noqa: RUF012 - as in TRL
    _name = "cDPO"
    _signature_columns: list[str]

    def __init__(
        self, model: Any, args: DPOConfig, *, data_collator: Any = None, processing_class: Any, **options: Any
    ) -> None:
        plain = {"f_divergence_type": "reverse_kl", "label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False}
        unknown = [name for name, value in plain.items() if getattr(args, name) != value]
        if list(args.loss_type) != ["sigmoid"] or unknown or args.precompute_ref_log_probs:
            raise ValueError(
                "cDPO is a loss of its own: leave loss_type, precompute_ref_log_probs and "
                f"{unknown or 'the rest'} as they are"
            )
        if data_collator is None:
            if processing_class.pad_token is None:
                processing_class.pad_token = processing_class.eos_token
            data_collator = ConfidenceCollator(processing_class.pad_token_id, args.max_length, args.truncation_mode)
        super().__init__(
            model=model, args=args, data_collator=data_collator, processing_class=processing_class, **options
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns
        self._signature_columns = [*known, *(name for name in (COLUMN, *SCORES) if name not in known)]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        policy = self.model if model is None else model
        if "ref" in getattr(policy, "peft_config", {}) and not self.is_fsdp_enabled:
            # beside the folder `ref` the policy's own adapter lies in no folder, and Transformers looks at folders only
            policy.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
            policy.set_adapter("default")

    @torch.no_grad()
    def pair_losses(self, rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
        """Loss and ``z`` of each row, which is as the collator takes it, with the policy as it is now."""
        was_training = self.model.training
        found: list[tuple[float, float]] = []
        self.model.eval()
        for inputs in self._batches(rows):
            with self.compute_loss_context_manager():
                chosen, rejected, _ = self._log_ratios(self.model, inputs)
            z = self.beta * (chosen - rejected).float()
            found += zip(cdpo_loss(z, inputs[COLUMN].to(z.dtype)).tolist(), z.tolist(), strict=True)
        self.model.train(was_training)
        return found

    @torch.no_grad()
    def divergence(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        """An estimate of the policy's KL to its reference from each row's chosen answer, in nats an answer, if the
        policy drew it and nothing bent its distribution: Schulman's k3, ``r - 1 - log r`` of reference to policy,
        summed over the tokens. It is never negative, and on average the sum of the tokens' divergences.
        """
        model = self.accelerator.unwrap_model(self.model)
        was_training, found = model.training, []
        model.eval()
        for inputs in self._batches(rows):
            half = len(inputs["input_ids"]) // 2  # chosen ones come first
            texts = {name: inputs[name][:half] for name in ("input_ids", "attention_mask", "completion_mask")}
            with self.compute_loss_context_manager():
                policy = self._token_log_probs(model, texts).log_probs
                with self._reference(model) as reference:
                    log_ratio = self._token_log_probs(reference, texts).log_probs.float() - policy.float()
            found += (log_ratio.expm1() - log_ratio).sum(dim=1).tolist()
        model.train(was_training)
        return found

    def _batches(self, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(rows), size):
            yield self._prepare_inputs(self.data_collator(list(rows[start : start + size])))

    @contextmanager
    def _reference(self, model: Any) -> Iterator[Any]:
        """The model that the policy is pulled to: one of its own, or this one with the adapter that it began with."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                yield model

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        confidence = inputs[COLUMN]
        scores = {name: inputs[name] for name in SCORES}
        chosen, rejected, aux_loss = self._log_ratios(model, inputs)
        loss = cdpo_loss(self.beta * (chosen - rejected), confidence.to(chosen.dtype)).mean()
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss
        self._note(chosen.detach(), rejected.detach(), confidence, scores)
        self._count_tokens(inputs["attention_mask"])
        return (loss, None) if return_outputs else loss

    def _log_ratios(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Policy against reference: of the chosen answers and of the rejected ones, ``[B]`` each, in nats; and what
        ``_log_probs`` gives beside.
        """
        texts = {name: value for name, value in inputs.items() if name != COLUMN and name not in SCORES}
        logps, aux_loss = self._log_probs(model, texts)
        reference = self.compute_ref_log_probs(self.ref_model or self.model, texts)
        chosen, rejected = (ours - theirs for ours, theirs in zip(logps.chunk(2), reference, strict=True))
        return chosen, rejected, aux_loss

    def _log_probs(self, model: Any, texts: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each answer, chosen ones first, ``[2B]``; and a mixture-of-experts model's
        load-balancing loss.
        """
        outputs = self._token_log_probs(
            model, texts, **({"output_router_logits": True} if self.aux_loss_enabled else {})
        )
        return outputs.log_probs.sum(dim=1), outputs.aux_loss if self.aux_loss_enabled else None

    def _token_log_probs(self, model: Any, texts: dict[str, Any], **more: Any) -> Any:
        """Outputs with the log-probability of each token of an answer given those before it, 0 for the others."""
        kwargs = {name: value for name, value in texts.items() if name != "completion_mask"}
        labels = texts["input_ids"].masked_fill(texts["completion_mask"] == 0, -100)
        return model(**kwargs, **more, labels=labels, use_cache=False, fused_lm_head=True)

    def _note(self, chosen: Tensor, rejected: Tensor, confidence: Tensor, scores: dict[str, Tensor]) -> None:
        """Collects metrics over all processes; ``chosen`` and ``rejected`` are log-ratios ``[B]``."""
        gathered = self.accelerator.gather
        chosen, rejected, confidence = gathered(chosen), gathered(rejected), gathered(confidence)
        self._mean("rewards/chosen", self.beta * chosen)
        self._mean("rewards/rejected", self.beta * rejected)
        self._mean("rewards/margins", self.beta * (chosen - rejected))
        self._mean("rewards/accuracies", (chosen > rejected).float())
        self._mean("log_ratio", torch.cat([chosen, rejected]))
        self._mean("gamma", confidence)
        scores = {name: gathered(values) for name, values in scores.items()}
        self._agreement("hybrid/accuracy", scores["chosen_score"], scores["rejected_score"])
        self._agreement("monitor/accuracy", scores["monitor_chosen"], scores["monitor_rejected"])
        self._distribution("hybrid/reward", torch.cat([scores["chosen_score"], scores["rejected_score"]]))

    def _agreement(self, name: str, chosen: Tensor, rejected: Tensor) -> None:
        known = ~(chosen.isnan() | rejected.isnan())
        if known.any():
            self._mean(name, (chosen > rejected)[known].float())

    def _distribution(self, name: str, rewards: Tensor) -> None:
        known = rewards[~rewards.isnan()]
        if len(known):
            self._mean(f"{name}/mean", known)
            self._mean(f"{name}/std", known.std(correction=0))
            for percent in (10, 50, 90):
                self._mean(f"{name}/p{percent}", known.quantile(percent / 100))

    def _mean(self, name: str, values: Tensor) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(values.mean().item())

    def _count_tokens(self, attention_mask: Tensor) -> None:
        if self.model.training:
            self._total_train_tokens += int(self.accelerator.gather(attention_mask.sum()).sum().item())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
