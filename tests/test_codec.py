import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inward import codec
from inward.types import Failed, Group, HeadRef, Job, Sample, SamplingSpec, Scored, Scores, Timing, Usage

JOB = Job(
    "a1", Group((1, 2, 300), ((4,), ())), ("safety", "other"), frozenset({"tokens"}), True, 12.5, 2.25, "", "bulk"
)
SCORED = Scored(
    "a1",
    (HeadRef("safety", "legend", 3),),
    (
        Scores(
            (1.5, None), pair={"margin": 0.25}, layers_N=({"layers": [1], "values": [0.5]},) * 2, tokens_N=((0.5,), ())
        ),
    ),
    "base",
    Usage(6, 1, 3),
    (Sample((4, 5), "text", "stop"),),
    Timing(0.5, 0.125),
)
FAILED = Failed("a1", "not_found", "no head 'x'", Timing(0.5, 0.0))


@pytest.mark.parametrize("outcome", [SCORED, FAILED])
def test_an_outcome_arrives_as_it_was_sent(outcome):
    assert codec.decode_outcome(codec.encode(outcome)) == outcome


ids = st.lists(st.integers(0, 2**31 - 1), max_size=20).map(tuple)
groups = st.builds(
    Group, ids, st.lists(ids, max_size=4).map(tuple), st.none() | st.builds(SamplingSpec, st.integers(1, 64))
)


@given(groups, st.booleans(), st.floats(allow_nan=False))
def test_a_job_arrives_as_it_was_sent(group, pair, deadline):
    job = Job("x", group, ("h",), frozenset({"layers"}), pair, deadline, trace="00-4bf9-00f0-01")
    assert codec.decode_job(codec.encode(job)) == job


JOB_V1 = (
    "018ba26973a36a6f62a26964a26131a567726f757083aa70726f6d70745f696473930102cd012cad726573706f6e7365735f69647392910490a87361"
    "6d706c696e67c0a5686561647392a6736166657479a56f74686572a764657461696c7391a6746f6b656e73a470616972c3a8646561646c696e65cb40"
    "29000000000000a8656e717565756564cb4002000000000000a87265706c795f746fa0a87072696f72697479a462756c6baa64656c69766572696573"
    "01"
)
SCORED_V1 = (
    "0188a26973a673636f726564a66a6f625f6964a26131a568656164739183a46e616d65a6736166657479a46b696e64a66c6567656e64a77665727369"
    "6f6e03a673636f7265739186a873636f7265735f4e92cb3ff8000000000000c0ad70726f626162696c6974795f4ec0a86c61796572735f4e9282a66c"
    "61796572739101a676616c75657391cb3fe000000000000082a66c61796572739101a676616c75657391cb3fe0000000000000a8746f6b656e735f4e"
    "9291cb3fe000000000000090a47061697281a66d617267696ecb3fd0000000000000a86c69737477697365c2ae706f6c6963795f76657273696f6ea4"
    "62617365a5757361676583ad70726f6d70745f746f6b656e7306b1636f6d706c6574696f6e5f746f6b656e7301ad6361636865645f746f6b656e7303"
    "a773616d706c65739183a3696473920405a474657874a474657874ad66696e6973685f726561736f6ea473746f70a674696d696e6782a67175657565"
    "64cb3fe0000000000000a9696e666572656e6365cb3fc0000000000000"
)
FAILED_V1 = (
    "0185a26973a66661696c6564a66a6f625f6964a26131a4636f6465a96e6f745f666f756e64a76d657373616765ab6e6f206865616420277827a67469"
    "6d696e6782a6717565756564cb3fe0000000000000a9696e666572656e6365cb0000000000000000"
)


def test_messages_of_version_1_are_understood_for_ever():
    """Bytes that the first release wrote; never to be generated anew."""
    assert codec.decode_job(bytes.fromhex(JOB_V1)) == JOB
    assert codec.decode_outcome(bytes.fromhex(SCORED_V1)) == SCORED
    assert codec.decode_outcome(bytes.fromhex(FAILED_V1)) == FAILED


def test_fields_that_a_newer_process_added_are_skipped_and_missing_ones_take_their_default():
    body = msgpack.unpackb(codec.encode(JOB)[1:])
    body["colour"] = "red"
    del body["priority"], body["deliveries"]
    assert codec.decode_job(b"\x01" + msgpack.packb(body)) == Job(
        *[getattr(JOB, n) for n in ("id", "group", "heads", "details", "pair", "deadline", "enqueued")]
    )


def test_a_message_of_an_older_version_is_upgraded(monkeypatch):
    monkeypatch.setattr(codec, "VERSION", 2)
    monkeypatch.setattr(codec, "UPGRADES", {1: lambda body: body | {"id": body["id"] + "!"}})
    assert codec.decode_job(b"\x01" + codec.encode(JOB)[1:]).id == "a1!"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x07" + codec.encode(JOB)[1:],
        codec.encode(FAILED),
        b"\x01\xc1",
        b"\x01\x90",
        b"\x01\x81\xa2is\xa3job",
    ],
)
def test_what_is_no_job_of_a_known_version_is_unreadable(data):
    with pytest.raises(codec.Unreadable):
        codec.decode_job(data)


def test_what_would_not_arrive_is_refused_at_the_sender():
    with pytest.raises(TypeError, match="can't be sent between processes"):
        codec.encode(Scored("a", (), (Scores((1.0,), pair={"margin": object()}),), "base", Usage()))
