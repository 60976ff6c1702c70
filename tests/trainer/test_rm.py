"""Reward models with margins, in TRL's real trainer on a tiny model, with a stand-in for the service."""

import json

import pytest
import torch

from inward_trainer import rm
from inward_trainer.errors import DataError, OptionsError
from inward_trainer.options import RewardOptions
from inward_trainer.pairs import read_row
from inward_trainer.service import Service
from support.fake_inward import FakeInward, score, served
from support.small_policy import rows, write_policy, write_rows


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy"))


def options(policy, tmp_path, **more):
    pairs = write_rows(tmp_path / "pairs.jsonl", more.pop("rows", rows(8)))
    quick = {
        "batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 128,
        "full": True,
        "bf16": False,
        "training": {"disable_tqdm": True},
    }
    return RewardOptions(**{**quick, "model": str(policy), "pairs": pairs, "out": tmp_path / "run", **more})


def margins_of(run, url):
    pairs = [read_row(row, str(i)) for i, row in enumerate(rows(8))]
    return rm._with_margins(run.model_copy(update={"url": url}), pairs, [None] * 8)


def test_learns_to_rank_and_reports_it(policy, tmp_path, capsys):
    run = options(policy, tmp_path, rows=[row | {"margin": 0.5} for row in rows(8)], margins="column", epochs=6)
    run = run.model_copy(update={"held_out": run.pairs})
    assert rm.run(run) == 0
    report = json.loads((run.out / "report.json").read_text())
    assert report == {"pairs": 8, "margins": "column", "held_out_pairs": 8, "held_out_accuracy": 1.0}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    assert (run.out / "final/model.safetensors").is_file()


def test_margins_enter_the_loss(policy, tmp_path):
    losses = []
    for margin in (0.0, 3.0):
        folder = tmp_path / str(margin)
        folder.mkdir()
        run = options(policy, folder, rows=[row | {"margin": margin} for row in rows(4)], margins="column", steps=1)
        trainer = rm._trainer(
            run,
            rm.Tokeniser(rm.load_tokenizer(run)),
            [{"chosen_ids": [2, 3], "rejected_ids": [4], "margin": margin}] * 4,
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    untrained = torch.tensor(losses)
    assert untrained[1] - untrained[0] > 2.0, "-log sigmoid(-3) is 3.05, -log sigmoid(0) is 0.69"


def test_margins_come_from_the_service(policy, tmp_path):
    with served(FakeInward()) as url:
        run = options(policy, tmp_path)
        pairs, bins = margins_of(run, url)
        assert (len(pairs), len(bins)) == (8, 8)
        assert bins == [min(1.0, max(0.0, score(pair.chosen) - score(pair.rejected))) for pair in pairs]
        assert margins_of(run.model_copy(update={"margins": "constant"}), url)[1] == [sum(bins) / 8] * 8
        kept, _ = margins_of(run.model_copy(update={"drop_disagreeing": True}), url)
        assert kept == [pair for pair in pairs if score(pair.chosen) > score(pair.rejected)] != pairs
        with Service(url) as asked:
            assert asked.margins(pairs)[0]["margin"] == score(pairs[0].chosen) - score(pairs[0].rejected)


def test_what_is_missing_is_told(policy, tmp_path):
    with pytest.raises(OptionsError, match="give --url"):
        rm.run(options(policy, tmp_path))
    with pytest.raises(DataError, match="no `margin`"):
        rm.run(options(policy, tmp_path, margins="column"))
