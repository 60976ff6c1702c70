"""What a run learnt, as one model and as an adapter."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from inward_trainer import export
from inward_trainer.errors import OptionsError
from inward_trainer.options import ExportOptions
from support.small_policy import write_policy

IDS = torch.tensor([[2, 30, 40, 50]])


@pytest.fixture
def adapter(tmp_path):
    """An adapter that changes something, beside its base model."""
    base = write_policy(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def test_merged_and_apart_it_is_the_same_policy(adapter, tmp_path):
    given = {"adapter": adapter, "dtype": "float32"}
    assert export.run(ExportOptions(**given, out=tmp_path / "whole")) == 0
    assert export.run(ExportOptions(**given, out=tmp_path / "apart", merge=False)) == 0
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    without = logits(base)
    apart = logits(PeftModel.from_pretrained(base, tmp_path / "apart"))
    assert torch.allclose(logits(whole), apart, atol=1e-4)
    assert not torch.allclose(without, apart, atol=1e-2)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template
    assert not list((tmp_path / "apart").glob("model*.safetensors"))


def test_a_reward_model_is_exported_with_its_score_head(tmp_path):
    base, kind = write_policy(tmp_path / "base"), transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(base, num_labels=1)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(model, lora)
    model.save_pretrained(tmp_path / "adapter")
    assert export.run(ExportOptions(adapter=tmp_path / "adapter", out=tmp_path / "whole", dtype="float32")) == 0
    whole = kind.from_pretrained(tmp_path / "whole")
    assert torch.allclose(logits(whole), logits(model), atol=1e-4)
    pad = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole").pad_token_id
    assert whole.config.pad_token_id == pad is not None
    padded = torch.cat([IDS, torch.full((1, 2), pad)], dim=1)
    assert torch.allclose(whole(padded).logits, logits(model), atol=1e-4)


def test_what_is_missing_or_in_the_way_is_told(adapter, tmp_path):
    for given, said in (
        ({}, "--adapter and --out"),
        ({"adapter": tmp_path / "base", "out": tmp_path / "x"}, "base is no adapter"),
        ({"adapter": adapter, "out": adapter}, "is there already"),
        ({"adapter": adapter, "out": tmp_path / "x", "model": "./nowhere"}, "no folder nowhere"),
    ):
        with pytest.raises(OptionsError, match=said):
            export.run(ExportOptions(**given))
