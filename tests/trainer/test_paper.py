"""``inward-train paper`` on a model of two blocks and data of a few rows."""

import json
import re
import signal

import pytest
import torch
from pydantic import ValidationError

from inward_client.rows import Pair
from inward_trainer.__main__ import parser
from inward_trainer.errors import OptionsError
from inward_trainer.options import PaperOptions, read_options
from inward_trainer.paper import run as paper
from inward_trainer.paper.data import FILES, Data, _answers, key
from inward_trainer.paper.sizes import QUICK, Sizes, chosen
from inward_trainer.paper.table import Table
from inward_trainer.paper.workers import arguments
from support.paper_data import write_data
from support.small_policy import write_policy


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "sets")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy"))


def options(policy, data, out, **more):
    return PaperOptions(model=str(policy), data=data, out=out, device="cpu", quick=True, scale=0.1, **more)


@pytest.mark.parametrize(
    ("asked", "device", "found"),
    [
        ({}, "cuda", (1.0, 48, 384)),
        ({}, "cpu", (0.1, 16, 38)),
        ({"scale": 1, "sizes": "steps=3"}, "cpu", (1.0, 3, 384)),
        ({"sizes": "train_prompts=50"}, "cpu", (0.1, 16, 50)),
        ({"sizes": {"steps": 3}}, "cuda", (1.0, 3, 384)),
        ({"quick": True}, "cpu", (1.0, 4, 16)),
    ],
)
def test_a_processor_gets_what_it_does_in_hours_unless_more_is_asked(asked, device, found):
    scale, sizes = chosen(PaperOptions(**asked), torch.device(device))
    assert (scale, sizes.steps, sizes.train_prompts) == found


def test_a_size_that_is_none_is_named():
    with pytest.raises(OptionsError, match=r"--sizes: there is no pairs; there are held_out, .*margin_pairs"):
        chosen(PaperOptions(sizes="pairs=3, steps=2"), torch.device("cpu"))
    for wrong in ("steps", "steps=0", "steps=x"):
        with pytest.raises(ValidationError, match="steps"):
            PaperOptions(sizes=wrong)


def test_nobody_sees_a_judges_prompts_and_what_is_reported_was_seen_by_nobody(data):
    found = Data.open(data, Sizes())
    judged = {key(row.prompt) for row in found.judge_train}
    fitted = {key(pair.prompt) for pair in [*found.head_pairs, *found.monitor_pairs, *found.margin_pairs]}
    fitted |= {key(prompt) for prompt in [*found.align_prompts, *found.calibration]}
    reported = {key(prompt) for prompts in found.held_out.values() for prompt in prompts}
    reported |= {key(pair.prompt) for pairs in found.test_pairs.values() for pair in pairs}
    reported |= {key(prompt) for prompt in [*found.xstest_safe, *found.xstest_unsafe, *found.harmless]}
    reported |= {key(one.prompt) for one in [*found.lists, *found.plain_texts]}
    assert judged and fitted and reported
    assert not judged & fitted and not judged & reported and not fitted & reported
    assert not judged & {key(row.prompt) for row in found.judge_test}
    assert not {key(p.prompt) for p in found.head_pairs} & {key(p.prompt) for p in found.monitor_pairs}


@pytest.mark.parametrize("turned", [False, True])
def test_an_answer_has_the_label_of_most_of_its_pairs(turned):
    pairs = [Pair("p", "mostly safe", "unsafe"), Pair("p", "mostly safe", "either"), Pair("p", "either", "mostly safe")]
    found = {answer.text: answer.safe for answer in _answers(pairs[::-1] if turned else pairs)}
    assert found == {"mostly safe": True, "unsafe": False}


def test_missing_files_are_named(tmp_path, policy):
    with pytest.raises(OptionsError, match=r"lacks .*advbench_goals.jsonl.*xstest_completions.jsonl"):
        paper.run(options(policy, tmp_path, tmp_path / "out"))


def test_a_table_that_does_not_exist_is_refused():
    with pytest.raises(OptionsError, match="there is no teapot; there are judge, alignment"):
        paper.chosen(["judge", "teapot"])
    assert paper.chosen(["hybrid"]) == ["alignment", "topk", "probes"]


def test_what_a_signal_does_is_what_it_was_before(policy, data, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert paper.run(options(policy, data, tmp_path, tables=["report"])) == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_share_leaves_at_least_some_of_everything():
    small = Sizes().scaled(1e-6)
    assert small.held_out == small.head_pairs == 4 and small.steps == Sizes().steps
    assert QUICK.scaled(1) == QUICK


def test_tables_and_report(policy, data, tmp_path, monkeypatch):
    def broken(run):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(paper.TABLES, "legend", broken)
    wanted = options(policy, data, tmp_path, tables=["judge", "legend", "alignment", "srr"])
    assert paper.run(wanted) == 1
    judge = json.loads((tmp_path / "judge.json").read_text())
    assert [row["name"].split(":")[0] for row in judge["rows"]] == ["judge", "bag of words"] * 2
    words = next(row for row in judge["rows"] if row["name"] == "bag of words: JailbreakBench")
    assert words["cells"]["AUC"]["value"] > 0.9  # the unsafe answers share words

    alignment = json.loads((tmp_path / "alignment.json").read_text())
    assert alignment["complete"] and len(alignment["rows"]) == 9
    for row in alignment["rows"]:
        low, value, high = (row["cells"]["unsafe, by judge"][name] for name in ("low", "value", "high"))
        assert 0 <= low <= value <= high <= 1
    by_name = {row["name"]: row["cells"] for row in alignment["rows"]}
    assert "against base" not in by_name["base"] and by_name["SFT on safe answers"]["against base"] is not None

    assert (tmp_path / "legend.failed").read_text() == "RuntimeError: no such luck"
    for page in ("report.md", "report.html"):
        text = (tmp_path / page).read_text()
        assert "no such luck" in text and "not made yet: --tables cost" in text and "Ranking lists" in text
        assert "weapon" not in text  # no text of the data or of an answer

    def unused(*_):
        raise AssertionError("it is there already")

    monkeypatch.setitem(paper.TABLES, "judge", unused)
    assert paper.run(wanted.model_copy(update={"tables": ["judge"]})) == 0

    def of_seeds(run):
        assert run.seeds == [*wanted.seeds, 7]
        return Table("judge", "Anew", [], [])

    monkeypatch.setitem(paper.TABLES, "judge", of_seeds)
    assert paper.run(wanted.model_copy(update={"tables": ["judge"], "seeds": [7]})) == 0
    text = (tmp_path / "report.md").read_text()
    assert f"seeds {', '.join(map(str, wanted.seeds))}, 7; " in text and "no GPU; cpu" not in text
    assert f"Of seeds {', '.join(map(str, wanted.seeds))} only." in text  # the other tables


def test_a_folder_is_of_one_setting_and_of_any_seeds(policy, data, tmp_path):
    def ran(**more):
        assert paper.run(options(policy, data, tmp_path, tables=["srr"], minutes=1e-9, **more)) == 0

    ran(sizes={"steps": 7})
    ran(sizes={"steps": 7}, seeds=[1])
    with pytest.raises(OptionsError, match=r"has a run with another sizes: give the options that it has"):
        ran(sizes={"steps": 8})
    with pytest.raises(OptionsError, match="another learning rate, files"):
        (other := tmp_path / "sets").mkdir()
        for file in data.iterdir():
            (other / file.name).write_text(file.read_text().replace("weapon", "knife"))
        paper.run(options(policy, other, tmp_path, tables=["srr"], sizes={"steps": 7}, learning_rate=1e-3))
    assert paper.run(options(policy, data, tmp_path, tables=["report"], sizes={"steps": 8})) == 0


def test_a_folder_of_a_former_version_has_its_report_and_keeps_its_device(policy, data, tmp_path):
    def ran(*tables):
        assert paper.run(options(policy, data, tmp_path, tables=[*tables], minutes=1e-9)) == 0
        return (tmp_path / "report.md").read_text(), json.loads((tmp_path / "setting.json").read_text())

    _, setting = ran("srr")
    del setting["devices"]
    (tmp_path / "setting.json").write_text(json.dumps(setting | {"device": "cuda, a GPU"}))
    assert "on cuda, a GPU, in " in ran("report")[0]
    text, setting = ran("srr")
    assert setting["devices"] == ["cuda, a GPU", "cpu, no GPU"] and "on cuda, a GPU; cpu, no GPU, in " in text
    (tmp_path / "setting.json").write_text(json.dumps({n: v for n, v in setting.items() if n != "precision"}))
    assert "on cuda, a GPU; cpu, no GPU; seeds 0" in ran("report")[0]


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:77"])
def test_a_device_that_is_not_there_is_named(policy, data, tmp_path, device):
    with pytest.raises(OptionsError, match=f"--device {device}: "):
        paper.run(options(policy, data, tmp_path / "out").model_copy(update={"device": device}))


def test_where_time_is_up_rows_say_so(policy, data, tmp_path):
    assert paper.run(options(policy, data, tmp_path, tables=["srr"], minutes=1e-9, sizes={"steps": 7})) == 0
    assert json.loads((tmp_path / "setting.json").read_text())["sizes"]["steps"] == 7
    table = json.loads((tmp_path / "srr.json").read_text())
    assert not table["complete"] and all("not reached in the time" in row["reason"] for row in table["rows"])
    assert re.search(r"SRR \(not reached in the time", (tmp_path / "report.md").read_text())


def test_every_file_is_named_in_one_place(data):
    assert {path.name for path in data.iterdir()} == set(FILES.values())


def test_workers_have_the_options_of_the_command_and_tables_of_their_own(tmp_path):
    options = PaperOptions(
        out=tmp_path,
        data=tmp_path / "sets",
        quick=True,
        seeds=[2, 0],
        minutes=4,
        sizes={"steps": 3, "tokens": 9},
        workers=3,
    )
    args = parser().parse_args(["paper", *arguments(options, ["srr", "judge"])])
    assert read_options(PaperOptions, args, {}) == options.model_copy(update={"tables": ["srr", "judge"], "workers": 1})
