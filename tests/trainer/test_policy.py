"""The policy's versions, as the adapters folder has them; and how old a pair of a stream may be."""

import json

import pytest

from inward_trainer import cdpo
from inward_trainer.logs import read_log
from inward_trainer.policy import FILES, Publisher
from support.fake_inward import FakeInward, served, service
from support.small_policy import options, rows, write_policy


@pytest.fixture
def published(tmp_path):
    """Publishes steps of a run; gives the publisher."""
    fake = FakeInward(adapters=tmp_path / "adapters")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in FILES:
        (checkpoint / file).write_text(file)
    with service(fake) as asked:

        def publish(*steps, keep=10):
            publisher = Publisher(fake.adapters, "run-1", asked, keep=keep)
            for step in steps:
                publisher.publish(step, checkpoint)
            return publisher

        yield publish, fake


def test_what_is_served_after_a_step_is_the_last_version_before_it(published):
    publish, fake = published
    publisher = publish(4, 8, 9)
    served_after = {0: "base", 3: "base", 4: "run-1-000004", 7: "run-1-000004", 8: "run-1-000008", 12: "run-1-000009"}
    assert {step: publisher.version(step) for step in served_after} == served_after
    assert [publisher.last_before(step) for step in (4, 8, 9)] == [0, 4, 8]
    assert fake.policies == ["base", "run-1-000004", "run-1-000008", "run-1-000009"]
    assert publish().version(9) == "run-1-000009", "also for a process that comes after"


def test_age_counts_versions_and_knows_only_those_of_this_run(published):
    publisher = published[0](4, 8, 9)
    assert [publisher.age("base", step) for step in (3, 4, 8, 9)] == [0, 1, 2, 3]
    assert [publisher.age("run-1-000004", step) for step in (4, 8, 9)] == [0, 1, 2]
    assert publisher.age("run-2-000004", 8) is None
    assert publisher.age(None, 8) is None


def test_only_the_newest_versions_of_the_run_stay(published):
    publish, fake = published
    (fake.adapters / "somebody-elses-000001").mkdir(parents=True)
    publish(1, 2, 3, 4, keep=2)
    there = sorted(path.name for path in fake.adapters.iterdir())
    assert there == ["run-1-000003", "run-1-000004", "somebody-elses-000001"]


def test_pairs_of_a_stream_that_are_too_old_are_refused_and_the_lag_is_logged(redis_server, tmp_path, caplog):
    fake = FakeInward(adapters=tmp_path / "adapters")
    scored = {"confidence": 0.9, "chosen_score": 1.0, "rejected_score": 0.0, "policy_version": "base"}
    with redis_server.client() as client, served(fake) as url:
        for row in rows(12):
            client.xadd("inward:{tiny}:scores:pairs", {"row": json.dumps(row | scored)})
        run = options(
            model=str(write_policy(tmp_path / "policy")), url=url, out=tmp_path / "run", source="stream", steps=6,
            redis_url=redis_server.url, idle=1.0, adapters=fake.adapters, publish_every=2, max_lag=1,
        )  # fmt: skip
        assert cdpo.run(run) == 0
    steps = [line for line in read_log(run.out / "log.jsonl") if "loss" in line]
    assert [line["policy_lag"] for line in steps] == [0, 0, 1, 1], "base is two versions behind after the fourth step"
    assert "2 pairs are refused at step 4: scored by a policy that is too old" in caplog.text
    assert fake.policies[-1].endswith("-000004")
