import csv
import json
from dataclasses import replace

import httpx
import pytest
import redis

from inward_trainer.errors import DataError, OptionsError, ServiceError, Stopped
from inward_trainer.pairs import ScoredPair, read_row
from inward_trainer.sources import Ended
from inward_trainer.sources.file import FilePairs, read_pairs, read_prompts
from inward_trainer.sources.job import pairs_of_job
from inward_trainer.sources.samples import SampledPairs
from inward_trainer.sources.stream import StreamedPairs
from inward_trainer.stopping import Stopping
from support.fake_inward import FakeInward, score, service, service_of
from support.small_policy import rows, write_rows

KEY = "inward:{demo}:scores:pairs"


def drain(source, n, cursor=None):
    """Ids of all that is taken, n at a time."""
    taken = []
    while True:
        try:
            some = source.take(n, cursor)
        except Ended:
            return taken
        taken += [pair.id for pair in some.pairs]
        cursor = some.cursor


# files


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path):
    pairs = read_pairs(write_rows(tmp_path / "pairs.jsonl", rows(10)))
    ids = drain(FilePairs(pairs, epochs=3, seed=1), 4)
    epochs = [ids[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert drain(FilePairs(pairs, epochs=3, seed=1), 7) == ids, "whatever is taken at once"
    assert drain(FilePairs(pairs, epochs=3, seed=1), 4, cursor=12) == ids[12:], "from wherever a run goes on"
    assert drain(FilePairs(pairs, epochs=1, seed=2), 10) != ids[:10]


def test_parquet_is_read_as_well(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(3)), tmp_path / "pairs.parquet")
    assert read_pairs(tmp_path / "pairs.parquet") == read_pairs(write_rows(tmp_path / "pairs.jsonl", rows(3)))


def test_numbers_of_a_csv_file_are_numbers(tmp_path):
    scored = [row | {"confidence": 0.9, "chosen_score": 1.5, "rejected_score": -2} for row in rows(2)]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, scored[0])
        writer.writeheader()
        writer.writerows([*scored, rows(3)[2]])  # one without scores: fields of nothing
    bare = read_pairs(write_rows(tmp_path / "pairs.jsonl", [*scored, rows(3)[2]]))
    assert read_pairs(tmp_path / "pairs.csv") == bare
    assert (bare[0].chosen_score, bare[2].chosen_score) == (1.5, None)


def test_a_row_that_is_no_pair_is_left_out_with_a_word_and_a_file_without_one_is_refused(tmp_path, caplog):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"text": "alone"}\n')
    assert [pair.prompt for pair in read_pairs(tmp_path / "pairs.jsonl")] == ["p"]
    assert "1 of 2 rows are left out" in caplog.text
    (tmp_path / "none.jsonl").write_text('{"text": "alone"}\n')
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="nowhere"):
        read_pairs(tmp_path / "nowhere.jsonl")


def test_a_row_that_can_not_be_read_is_left_out_and_named(tmp_path, caplog):
    path = tmp_path / "pairs.jsonl"
    path.write_text('\ufeff{"prompt": "p", "chosen": "a", "rejected": "b"}\n[1]\n', encoding="utf-8")
    assert [pair.chosen for pair in read_pairs(path)] == ["a"]
    assert "1 of 2 rows are left out: 1 × must be a JSON object" in caplog.text
    assert "pairs.jsonl, line 2" in caplog.text
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 1: 'rejected' is missing|'prompt' is missing"):
        read_pairs(path)


def test_a_pair_has_its_whole_context_in_every_layout(tmp_path):
    system, asked = {"role": "system", "content": "s"}, {"role": "user", "content": "p"}
    answers = [{"role": "assistant", "content": text} for text in "ab"]
    layouts = [
        {"system": "s", "prompt": "p", "chosen": "a", "rejected": "b"},
        {"system": "s", "question": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": [system, asked, answers[0]], "rejected": [system, asked, answers[1]]},
        {"system": "s", "chosen": "Human: p\r\n\r\nAssistant: a", "rejected": "Human: p\r\n\r\nAssistant: b"},
    ]
    pairs = read_pairs(write_rows(tmp_path / "pairs.jsonl", layouts))
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [([system, asked], "a", "b")] * 4


def test_a_row_of_the_service_is_what_was_scored_whatever_it_looks_like():
    row = {"prompt": "Human: p\n\nAssistant:", "chosen": "a", "rejected": "b", "policy_version": "base"}
    assert read_row(row, "1-0", as_scored=True).prompt == row["prompt"]
    assert read_row(row, "0").prompt == [{"role": "user", "content": "p"}]


def test_prompts_are_taken_once_each(tmp_path):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}])
    assert read_prompts(tmp_path / "prompts.jsonl") == ["a", "b"]


# samples


def test_samples_are_best_against_worst_of_the_current_policy():
    fake = FakeInward()
    fake.policies.append("run-000002")
    with service(fake) as asked:
        taken = SampledPairs(asked, ["Birds?", "Boats?", "Locks?"], n=4, head="hybrid", seed=3).take(3, None)
    assert {pair.prompt for pair in taken.pairs} == {"Birds?", "Boats?", "Locks?"}
    for pair in taken.pairs:
        assert (pair.chosen_score, pair.rejected_score) == (score(pair.chosen), score(pair.rejected))
        assert pair.chosen_score > pair.rejected_score
        assert (pair.confidence, pair.policy_version) == (0.9, "run-000002")


def test_the_same_place_draws_the_same_samples_and_another_one_others():
    with service(FakeInward()) as asked:
        source = SampledPairs(asked, ["Birds?"], n=4, head="hybrid")
        first, again, next_epoch = source.take(1, None), source.take(1, None), source.take(1, 1)
    assert first == again
    assert first.pairs[0].chosen != next_epoch.pairs[0].chosen


def test_what_the_policy_wrote_is_kept_as_it_wrote_it():
    fake = FakeInward()
    original = fake.answer

    def with_ids(method, path, body):
        status, content = original(method, path, body)
        assert body["return_token_ids"] is True
        for n, result in enumerate(content["results"]):
            result |= {"token_ids": [n, 7], "finish_reason": "length" if n else "stop"}
        return status, content

    fake.answer = with_ids
    with service(fake) as asked:
        (pair,) = SampledPairs(asked, ["Birds?"], n=4, head="hybrid").take(1, None).pairs
    assert (pair.chosen_ids, pair.rejected_ids, pair.finished) == ((0, 7), (3, 7), (True, False))
    assert ScoredPair.from_json(json.loads(json.dumps(pair.to_json()))) == pair


def test_prompts_that_give_no_pair_are_passed_over():
    fake = FakeInward()
    refused = fake.answer

    def answer(method, path, body):
        if body["prompt"] == "too long":
            return 413, {"error": {"message": "too long"}}
        status, content = refused(method, path, body)
        if body["prompt"] == "all the same":
            content = content | {"results": content["results"][:1]}
        return status, content

    fake.answer = answer
    with service(fake) as asked:
        source = SampledPairs(asked, ["too long", "all the same", "Birds?"], n=4, head="hybrid", epochs=1)
        assert len(drain(source, 1)) == 1


def test_prompts_whose_samples_never_differ_are_an_error_and_no_endless_loop(caplog):
    fake = FakeInward()
    original = fake.answer

    def all_the_same(method, path, body):
        status, content = original(method, path, body)
        return status, content | {"results": content["results"][:1]}

    fake.answer = all_the_same
    with service(fake) as asked, pytest.raises(DataError, match="none of the last 100 rounds of samples gave a pair"):
        SampledPairs(asked, ["Birds?", "Boats?"], n=4, head="hybrid").take(2, None)
    assert caplog.text.count("rounds of samples") == 1
    assert len(fake.drawn) == 200


def test_an_option_that_is_refused_ends_the_draw_at_once():
    fake = FakeInward()
    original = fake.answer

    def refusing(method, path, body):
        if body.get("early_rejection"):
            param = "early_rejection.max_loss"
            return 422, {"error": {"message": "a loss of at most 0.01 can't be kept", "param": param}}
        return original(method, path, body)

    fake.answer = refusing
    with service(fake) as asked, pytest.raises(ServiceError, match=r"a loss of at most 0\.01 can't be kept"):
        SampledPairs(asked, ["Birds?"], n=4, head="hybrid", early_rejection={"max_loss": 0.01}).take(1, None)
    assert len(fake.asked) == 0


# bulk jobs


class FakeJobs:
    """Bulk jobs of the service: rows go in, and are scored when the job is looked at for the second time."""

    def __init__(self):
        self.uploads, self.looks, self.keys, self.lose = [], 0, [], 0

    def answer(self, request):
        path, job = request.url.path, {"id": "j1", "kind": "reward", "rows": 3, "done": 0}
        if request.method == "POST":
            self.keys.append(request.headers["idempotency-key"])
            if self.lose:
                self.lose -= 1
                raise httpx.ReadTimeout("the answer is lost")
            self.uploads.append([json.loads(line) for line in request.content.decode().splitlines()])
            assert request.url.params["kind"] == "reward"
            return httpx.Response(201, json=job | {"state": "running"})
        if path.endswith("/results"):
            scored = {"chosen_score": 1.0, "rejected_score": 0.0, "confidence": 0.8, "policy_version": "base"}
            results = [
                {"index": i} | ({"error": {"message": "no"}} if i == 1 else scored)
                for i in range(len(self.uploads[-1]))
            ]
            jsonl = {"content-type": "application/x-ndjson"}
            return httpx.Response(200, text="".join(json.dumps(r) + "\n" for r in results), headers=jsonl)
        self.looks += 1
        return httpx.Response(200, json=job | {"state": "done" if self.looks > 1 else "running"})


def test_a_bulk_job_scores_a_file_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("inward_trainer.sources.job.POLL_S", 0.01)
    path, jobs = write_rows(tmp_path / "pairs.jsonl", rows(3)), FakeJobs()
    with service_of(jobs.answer) as asked:
        pairs = pairs_of_job(asked, path, tmp_path)
        assert pairs_of_job(asked, path, tmp_path) == pairs
    assert len(jobs.uploads) == 1
    assert [pair.id for pair in pairs] == ["0", "2"], "a row that could not be scored is left out"
    assert "1 rows can't be scored and are left out: 1" in caplog.text
    assert pairs[1] == replace(
        read_pairs(path)[2], chosen_score=1.0, rejected_score=0.0, confidence=0.8, policy_version="base"
    )
    for others in (rows(5), rows(3)[::-1]):
        write_rows(path, others)
        with service_of(jobs.answer) as asked, pytest.raises(DataError, match="other rows than this run began with"):
            pairs_of_job(asked, path, tmp_path, begun=True)


def test_a_job_of_other_rows_keeps_no_run_from_beginning_with_the_right_one(tmp_path, monkeypatch):
    monkeypatch.setattr("inward_trainer.sources.job.POLL_S", 0.01)
    path, jobs = write_rows(tmp_path / "pairs.jsonl", rows(3)), FakeJobs()
    with service_of(jobs.answer) as asked:
        pairs = pairs_of_job(asked, path, tmp_path / "first")
        write_rows(path, rows(5))
        with pytest.raises(DataError, match="that was uploaded"):
            pairs_of_job(asked, path, tmp_path / "run", id="j1")
        write_rows(path, rows(3))
        assert pairs_of_job(asked, path, tmp_path / "run", id="j1") == pairs
        with pytest.raises(DataError, match="--job j2: this run began with job j1"):
            pairs_of_job(asked, path, tmp_path / "run", id="j2", begun=True)
        write_rows(path, rows(5))
        assert len(pairs_of_job(asked, path, tmp_path / "run")) == 4
    assert [len(upload) for upload in jobs.uploads] == [3, 5]


@pytest.mark.parametrize("kept", ["", "j1"])
def test_a_folder_of_a_former_version_goes_on(kept, tmp_path, monkeypatch):
    monkeypatch.setattr("inward_trainer.sources.job.POLL_S", 0.01)
    path, jobs = write_rows(tmp_path / "pairs.jsonl", rows(3)), FakeJobs()
    with service_of(jobs.answer) as asked:
        pairs = pairs_of_job(asked, path, tmp_path)
        (tmp_path / "job-given").write_text(kept)
        assert pairs_of_job(asked, path, tmp_path, begun=True) == pairs
    assert len(jobs.uploads) == 1


def test_a_job_of_another_head_keeps_no_run_from_beginning_with_the_right_one(tmp_path, monkeypatch):
    monkeypatch.setattr("inward_trainer.sources.job.POLL_S", 0.01)
    path, jobs = write_rows(tmp_path / "pairs.jsonl", rows(3)), FakeJobs()
    with service_of(jobs.answer) as asked:
        for head in ("wrong", "right"):
            pairs_of_job(asked, path, tmp_path, head=head)
        with pytest.raises(DataError, match="--head wrong: this run began with right"):
            pairs_of_job(asked, path, tmp_path, head="wrong", begun=True)
        with pytest.raises(DataError, match="--job j9: this run began with job"):
            pairs_of_job(asked, path, tmp_path, id="j9", head="right", begun=True)
        pairs_of_job(asked, path, tmp_path, head="right", begun=True)
    assert len(jobs.uploads) == len(set(jobs.keys)) == 2


def test_an_upload_whose_answer_is_lost_is_not_sent_again_by_itself_and_then_makes_the_same_job(tmp_path, monkeypatch):
    monkeypatch.setattr("inward_trainer.sources.job.POLL_S", 0.01)
    path, jobs = write_rows(tmp_path / "pairs.jsonl", rows(3)), FakeJobs()
    jobs.lose = 1
    with service_of(jobs.answer) as asked:
        with pytest.raises(ServiceError, match="the answer is lost"):
            pairs_of_job(asked, path, tmp_path)
        assert len(jobs.keys) == 1
        pairs_of_job(asked, path, tmp_path)
    assert len(jobs.keys) == 2 and len(set(jobs.keys)) == 1


# streams


@pytest.fixture
def stream(redis_server):
    """Opens consumers; one that is opened again is a trainer that was started again."""
    opened = []

    def open(consumer="trainer", idle=0.2, **more):
        opened.append(
            StreamedPairs(redis_server.url, KEY, **{"group": "g", "consumer": consumer, "idle": idle, **more})
        )
        return opened[-1]

    yield open
    for one in opened:
        one.close()


def append(client, n, start=0):
    return [client.xadd(KEY, {"row": json.dumps(row)}).decode() for row in rows(start + n)[start:]]


def test_entries_come_in_order_and_are_acknowledged_when_settled(redis_server, stream):
    with redis_server.client() as client:
        entries = append(client, 5)
        source = stream()
        first = source.take(3, None)
        assert [pair.id for pair in first.pairs] == list(first.receipts) == entries[:3]
        assert first.pairs[1].prompt == rows(5)[1]["prompt"]
        rest = source.take(3, first.cursor)
        assert client.xpending(KEY, "g")["pending"] == 5
        source.settle(first.receipts)
        source.settle(first.receipts)
        assert client.xpending(KEY, "g")["pending"] == 2
        source.settle(rest.receipts)
        assert client.xpending(KEY, "g")["pending"] == 0
        with pytest.raises(Ended):
            source.take(1, rest.cursor)


def test_what_was_taken_and_not_written_down_comes_again_and_what_was_written_down_does_not(redis_server, stream):
    with redis_server.client() as client:
        entries = append(client, 6)
        killed = stream()
        written_down = killed.take(2, None)
        killed.take(2, written_down.cursor)  # and there it was killed
        append(client, 1, start=6)
        assert drain(stream(), 3, cursor=written_down.cursor)[:4] == entries[2:6]
        assert drain(stream(), 3, cursor=None)[:6] == entries, (
            "a trainer that lost its folder gets all that nobody settled"
        )


def test_two_trainers_of_a_group_share(redis_server, stream):
    with redis_server.client() as client:
        entries = append(client, 4)
        one, other = stream("one").take(2, None), stream("other").take(2, None)
        assert [pair.id for taken in (one, other) for pair in taken.pairs] == entries


def test_two_runs_of_one_consumer_name_are_refused_and_one_that_was_killed_is_not(redis_server, stream, monkeypatch):
    monkeypatch.setattr("inward_trainer.sources.stream.CLAIM_S", 6)
    with redis_server.client() as client:
        entries = append(client, 2)
        first = stream(run="a")
        with pytest.raises(
            OptionsError, match=r"another run, a, reads .* as consumer trainer of group g: choose anoth"
        ):
            stream(run="b")
        again = stream(run="a")  # a run has one process at a time: this is the same one, started again
        assert [pair.id for pair in again.take(2, None).pairs] == entries
        first._claim._closed.set()  # and there both were killed
        again._claim._closed.set()
        claims = client.keys("*consumer*")
        assert claims and all(client.ttl(key) > 0 for key in claims)
        for key in claims:
            client.pexpire(key, 1)  # a while later
        assert stream(run="b").take(2, None).pairs, "it lets go after a while"


def test_a_stream_with_a_wrong_name_is_an_error_and_no_end(redis_server, stream):
    with redis_server.client() as client:
        client.xadd("inward:{demo}:scores:others", {"row": "{}"})
        with pytest.raises(
            OptionsError, match=r"nobody wrote to the stream .* within 0 s.*--queue.*demo}:scores:others"
        ):
            stream().take(1, None)
        with pytest.raises(OptionsError, match="within 0 s"):
            stream(idle=None, patience=0.2).take(1, None)


def test_a_stream_that_nobody_writes_is_left_when_somebody_asks(redis_server, stream):
    stopping = Stopping()
    stopping.request()
    with redis_server.client() as client, pytest.raises(Stopped):
        append(client, 1)
        stream(idle=None, stopping=stopping).take(1, "9999999999999-0")


def test_what_is_no_pair_or_was_trimmed_is_passed_over(redis_server, stream):
    with redis_server.client() as client:
        client.xadd(KEY, {"row": "no JSON"})
        client.xadd(KEY, {"row": json.dumps({"prompt": "an item", "response": "of kind score"})})
        trimmed, good = append(client, 2)
        assert drain(stream(), 1) == [trimmed, good]
        client.xdel(KEY, trimmed)
        assert drain(stream(), 2) == [good]
        assert client.xpending(KEY, "g")["pending"] == 1


def test_a_redis_that_is_away_for_a_moment_is_waited_for(own_redis):
    server = own_redis(appendonly="yes", appendfsync="always")
    source = StreamedPairs(server.url, KEY, group="g", consumer="trainer", idle=30, patience=60)
    with server.client() as client:
        entries = append(client, 2)
    first = source.take(1, None)
    server.kill()
    server.start()
    source.settle(first.receipts)
    assert [pair.id for pair in source.take(1, first.cursor).pairs] == entries[1:]
    source.close()


@pytest.mark.parametrize("error", [redis.ConnectionError, redis.TimeoutError])
def test_what_a_lost_reply_delivered_is_taken_all_the_same(redis_server, stream, monkeypatch, error):
    read, lost = redis.connection.Connection.read_response, []

    def losing(connection, *args, **kwargs):
        reply = read(connection, *args, **kwargs)
        if not lost and entries[0] in str(reply):
            lost.append(reply)
            connection.disconnect()
            raise error("the answer is lost")
        return reply

    with redis_server.client() as client:
        entries = append(client, 3)
        source = stream()
        monkeypatch.setattr(redis.connection.Connection, "read_response", losing)
        assert drain(source, 1) == entries
        assert lost


@pytest.mark.parametrize("password", ["", ":wr0ng@"])
def test_a_redis_that_refuses_a_password_is_not_asked_again(own_redis, password):
    server = own_redis()
    with server.client() as client:
        client.config_set("requirepass", "sesame")
        with pytest.raises(OptionsError, match="--redis-url: Redis refuses the name or password"):
            StreamedPairs(server.url.replace("//", f"//{password}"), KEY, group="g", consumer="c", patience=1)


@pytest.mark.parametrize("url", ["redis://:s3cret/x@host:6379", "redis://:a@host:s3cret", "s3cret"])
def test_no_part_of_a_password_is_in_the_message_about_a_url(url):
    with pytest.raises(OptionsError, match="--redis-url") as caught:
        StreamedPairs(url, "rows", group="g", consumer="c")
    assert "s3cret" not in str(caught.value)
