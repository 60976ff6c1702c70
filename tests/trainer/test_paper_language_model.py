"""Batches on a device give what one text at a time gives."""

import numpy as np
import pytest
import torch

from inward_client.rows import Pair
from inward_trainer.models import load_tokenizer
from inward_trainer.paper.alignment import Alignment, Preference, minibatches
from inward_trainer.paper.batches import padded
from inward_trainer.paper.classifier import Classifier, open_classifier
from inward_trainer.paper.descent import autocast
from inward_trainer.paper.language_model import LanguageModel, Sampling, load_causal
from inward_trainer.paper.texts import encode, encode_pairs, prompt_ids
from inward_trainer.tokens import Tokeniser
from support.small_policy import write_policy
from support.tiny_tokenizer import TEXTS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def model(folder):
    """In float32, whatever this processor multiplies: batches are held to its precision."""
    return LanguageModel(load_causal(folder, torch.float32, CPU), Tokeniser(load_tokenizer(folder)))


@pytest.fixture(scope="module")
def texts(model):
    return encode(model.tokeniser, [(TEXTS[i % len(TEXTS)][:20], TEXTS[i % 3][: 5 + 4 * i]) for i in range(5)])


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_numbers_are_bfloat16_where_the_processor_multiplies_it(monkeypatch, folder, native, dtype):
    monkeypatch.setattr("inward.backbones.device.cpu_has_bfloat16", lambda: native)
    assert LanguageModel.load(folder, Tokeniser(load_tokenizer(folder)), CPU).model.dtype == dtype
    one = torch.ones(2, 2)
    with autocast(CPU):
        assert (one @ one).dtype == dtype


@pytest.mark.parametrize(("position", "back"), [("eos", 0), ("last", 1)])
def test_states_are_the_residual_stream_whatever_the_padding(model, texts, position, back):
    found = model.states(texts, position)
    for text, states_LD in zip(texts, found, strict=True):
        ids = torch.tensor([[*text.ids, model.tokeniser.eos_id]])
        out = model.model(input_ids=ids, output_hidden_states=True)
        torch.testing.assert_close(torch.from_numpy(states_LD[0]), out.hidden_states[1][0, -1 - back])
        normed = model.model.base_model.norm(torch.from_numpy(states_LD[1]))  # transformers' last one is normed
        torch.testing.assert_close(normed, out.hidden_states[2][0, -1 - back])


def test_states_of_prompts_do_not_depend_on_the_answer(model):
    one, other = encode(model.tokeniser, [("the same", "yes"), ("the same", "no, never")])
    states = model.states([one, other], "prompt")
    np.testing.assert_allclose(states[0], states[1], rtol=1e-4, atol=1e-5)


def test_log_probs_are_those_of_the_answer_alone(model, texts):
    for text, found in zip(texts, model.log_probs(texts), strict=True):
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
        start = len(text.prompt_ids)
        slow = sum(float(logits[i - 1, text.ids[i]]) for i in range(start, len(text.ids)))
        assert found == pytest.approx(slow, rel=1e-4)


def test_drawing_keeps_prompts_apart_and_is_the_same_again(model):
    asked = prompt_ids(model.tokeniser, ["a", "something longer than that", "b"])
    first, second = (model.draw(asked, 3, 6, seed=4) for _ in range(2))
    assert first == second
    assert [len(row) for row in first] == [3, 3, 3]
    assert all(len(one.ids) <= 6 and model.tokeniser.eos_id not in one.ids for row in first for one in row)
    assert model.draw(asked, 3, 6, seed=5) != first


def test_greedy_drawing_is_the_models_own(model):
    asked = prompt_ids(model.tokeniser, ["a", "something longer than that"])
    for ids, row in zip(asked, model.draw(asked, 1, 4, 0, greedy=True), strict=True):
        text = list(ids)
        for token in row[0].ids:
            logits = model.model(input_ids=torch.tensor([text])).logits[0, -1]
            assert int(logits.argmax()) == token
            text.append(token)


def test_sampling_leaves_the_best_eight_and_of_these_the_nucleus():
    scores = torch.full((1, 50), -5.0)
    scores[0, :20] = torch.linspace(3, 2.9, 20)
    kept = Sampling()(torch.tensor([[49]]), scores)
    assert int(kept.isfinite().sum()) == 8
    scores[0, 7] = 30.0
    assert Sampling()(torch.tensor([[49]]), scores).isfinite().nonzero().tolist() == [[0, 7]]


def test_sampling_penalises_what_was_said():
    scores = torch.tensor([[2.0, 1.9, -10.0, -10.0]])
    kept = Sampling()(torch.tensor([[0]]), scores)
    assert int(kept.argmax()) == 1
    torch.testing.assert_close(kept[0, 0], torch.tensor(2.0 / 1.2 / 1.4))


def test_a_classifier_scores_a_batch_as_it_scores_one_text(folder, model, texts):
    pad = model.pad
    torch.manual_seed(0)
    judge = Classifier(open_classifier(folder, pad, torch.float32), pad)
    together = judge.scores(texts)
    alone = [float(judge.scores([text])[0]) for text in texts]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
    for text, score in zip(texts, alone, strict=True):  # as transformers reads it, and TRL trains it
        assert score == pytest.approx(judge.model(input_ids=torch.tensor([text.ids])).logits.item(), rel=1e-4)


def test_preferring_raises_the_chosen_answer_and_the_reader_follows(folder, model, texts):
    alignment = Alignment(model, folder, lr=1e-2, steps=8, seed=0)
    row = Preference(texts[3], texts[4])
    before, base = (reader.log_probs([row.chosen, row.rejected]) for reader in (alignment.reader(), model))
    losses = [alignment.prefer([row])["loss"] for _ in range(8)]
    after = alignment.reader().log_probs([row.chosen, row.rejected])
    assert losses[0] == pytest.approx(np.log(2), rel=1e-3) and losses[-1] < losses[0]
    assert after[0] - after[1] > before[0] - before[1]
    np.testing.assert_allclose(before, base, rtol=1e-3)  # the reader may be in bfloat16
    np.testing.assert_array_equal(model.log_probs([row.chosen, row.rejected]), base)


def test_imitating_makes_an_answer_likelier(folder, model, texts):
    alignment = Alignment(model, folder, lr=1e-2, steps=4, seed=0)
    losses = [alignment.imitate([texts[4]])["loss"] for _ in range(4)]
    assert losses[-1] < losses[0]


def test_rows_are_padded_on_the_side_that_is_asked_for():
    ids, mask = padded([[1, 2], [3]], 0, CPU, left=True)
    assert ids.tolist() == [[1, 2], [0, 3]] and mask.tolist() == [[1, 1], [0, 1]]


def test_an_answer_that_was_cut_does_not_end(model):
    eos = model.tokeniser.eos_id
    ((chosen, rejected),) = encode_pairs(model.tokeniser, [Pair("Say it.", "all of it", "cut, " * 3)], whole=15)
    assert chosen.answer_ids[-1] == eos and rejected.answer_ids[-1] != eos
    assert [text.answer_ids[-1] == eos for text in encode(model.tokeniser, [("Say it.", "it")])] == [False]


def test_minibatches_go_through_all_rows_before_any_comes_again():
    batches = list(minibatches(5, 2, 5, seed=0))
    assert [len(batch) for batch in batches] == [2] * 5
    assert sorted(i for batch in batches for i in batch[:2]) == sorted([*range(5)] * 2)
