from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inward import codec
from inward.types import (
    Ended,
    Failed,
    Group,
    HeadRef,
    Job,
    LayerScores,
    PairScores,
    Piece,
    Sample,
    SamplingSpec,
    Scored,
    Scores,
    Timing,
    Usage,
)

JOB = Job(
    "a1", Group((1, 2, 300), ((4,), ())), ("safety", "other"), frozenset({"tokens"}), True, 12.5, 2.25, "", "bulk"
)
SCORED = Scored(
    "a1",
    (HeadRef("safety", "legend", 3),),
    (
        Scores(
            (1.5, None),
            layers_N=(LayerScores((1,), (0.5,)), LayerScores((1,), (None,), (0.25,))),
            tokens_N=((0.5,), ()),
            pair=PairScores(0.25, label_agrees=True, confidence=0.75),
        ),
    ),
    "base",
    Usage(6, 1, 3),
    (Sample((4, 5), "text", "stop"),),
    Timing(0.5, 0.125),
)
FAILED = Failed("a1", "not_found", "no head 'x'", Timing(0.5, 0.0), param="head")


@pytest.mark.parametrize("outcome", [SCORED, FAILED])
def test_an_outcome_arrives_as_it_was_sent(outcome):
    assert codec.decode_outcome(codec.encode(outcome)) == outcome


def test_a_piece_arrives_as_it_was_sent_and_is_no_outcome():
    piece = Piece("a1", 3, "text \u20ac")
    assert codec.decode_reply(codec.encode(piece)) == piece
    assert codec.decode_reply(codec.encode(FAILED)) == FAILED
    with pytest.raises(codec.Unreadable):
        codec.decode_outcome(codec.encode(piece))


def test_the_end_of_a_response_arrives_as_it_was_sent():
    ended = Ended("a1", 3, Sample((1, 2), "text", "rejected", stop_score=-0.5, held_back=2))
    assert codec.decode_reply(codec.encode(ended)) == ended
    scored = replace(ended, score=1.25, probability=0.5)
    assert codec.decode_reply(codec.encode(scored)) == scored
    with pytest.raises(codec.Unreadable):
        codec.decode_outcome(codec.encode(ended))


def test_a_job_of_a_replica_that_knows_nothing_of_pieces_is_not_told():
    fields = msgspec.msgpack.decode(codec.encode(replace(JOB, told=True))[2:])
    assert fields.pop("told") is True
    assert codec.decode_job(codec.encode(JOB)[:2] + msgspec.msgpack.encode(fields)) == JOB


def test_a_failure_of_a_worker_that_does_not_say_what_is_to_blame_is_read():
    fields = msgspec.msgpack.decode(codec.encode(FAILED)[2:])
    assert fields.pop("param") == "head"
    assert codec.decode_outcome(codec.encode(FAILED)[:2] + msgspec.msgpack.encode(fields)) == replace(
        FAILED, param=None
    )


def test_the_share_of_a_list_that_an_older_worker_sends_as_a_probability_is_none():
    listed = replace(SCORED, scores=(Scores((0.5, 0.25), (0.75, 0.25), listwise=True),))
    fields = msgspec.msgpack.decode(codec.encode(listed)[2:])
    assert fields["scores"][0].pop("share_N") is None
    (scores,) = codec.decode_outcome(codec.encode(listed)[:2] + msgspec.msgpack.encode(fields)).scores
    assert (scores.probability(0), scores.share(0)) == (None, None)


ids = st.lists(st.integers(0, 2**31 - 1), max_size=20).map(tuple)
groups = st.builds(
    Group, ids, st.lists(ids, max_size=4).map(tuple), st.none() | st.builds(SamplingSpec, st.integers(1, 64))
)


@given(groups, st.booleans(), st.floats(allow_nan=False))
def test_a_job_arrives_as_it_was_sent(group, pair, deadline):
    job = Job("x", group, ("h",), frozenset({"layers"}), pair, deadline, trace="00-4bf9-00f0-01")
    assert codec.decode_job(codec.encode(job)) == job


def test_fields_that_a_newer_process_added_are_skipped_and_missing_ones_take_their_default():
    body = msgspec.msgpack.decode(codec.encode(JOB)[2:])
    body["colour"] = "red"
    del body["priority"], body["deliveries"]
    assert codec.decode_job(b"\x02J" + msgspec.msgpack.encode(body)) == replace(JOB, priority="interactive")


def test_equal_jobs_are_equal_bytes_whatever_the_order_of_their_details():
    orders = [frozenset(order) for order in (("layers", "tokens"), ("tokens", "layers"))]
    first, second = (codec.encode(replace(JOB, details=details)) for details in orders)
    assert first == second
    assert first.index(b"layers") < first.index(b"tokens")


def test_maps_are_told_apart_by_what_they_are():
    data = codec.encode_map("answer", {"head": {"name": "safety"}})
    assert codec.decode_map(data, "question", "answer") == {"is": "answer", "head": {"name": "safety"}}
    with pytest.raises(codec.Unreadable, match="not a question"):
        codec.decode_map(data, "question")
    with pytest.raises(codec.Unreadable, match="not a answer"):
        codec.decode_map(codec.encode(JOB), "answer")


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"deadline": "soon"}, "deadline"),
        ({"priority": "first"}, "priority"),
        ({"group": {"prompt_ids": [1.5]}}, "prompt_ids"),
    ],
)
def test_a_job_with_a_field_of_another_type_is_unreadable_and_the_field_named(changed, field):
    body = msgspec.msgpack.decode(codec.encode(JOB)[2:]) | changed
    with pytest.raises(codec.Unreadable, match=field):
        codec.decode_job(b"\x02J" + msgspec.msgpack.encode(body))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x02",
        b"\x01" + codec.encode(JOB)[1:],
        b"\x07" + codec.encode(JOB)[1:],
        codec.encode(FAILED),
        b"\x02J\xc1",
        b"\x02J\x90",
        b"\x02J\x81\xa2id\xa1\xff",
        codec.encode(JOB)[:-1],
    ],
)
def test_what_is_no_job_of_a_known_version_is_unreadable(data):
    with pytest.raises(codec.Unreadable):
        codec.decode_job(data)


def test_what_would_not_arrive_is_refused_at_the_sender():
    with pytest.raises(TypeError, match="can't be sent between processes"):
        codec.encode(Scored("a", (), (Scores((object(),)),), "base", Usage()))
