"""Both clients against a service made of a function: what they send, send again, split and put together."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from inward_client import (
    AsyncInward,
    ConnectionFailed,
    DeadlineExceeded,
    Health,
    InvalidField,
    Inward,
    InwardError,
    NotFound,
    Ranked,
    RerankAnswer,
    StatusError,
    TimedOut,
    TooLarge,
    Unavailable,
    UnreadableAnswer,
)
from inward_client.core import ANSWER_S
from support.fake_transport import Service, envelope, in_turn, margins, refused


@pytest.fixture(params=["sync", "async"])
def call(request):
    """Calls a method of either client on a service and returns its answer."""

    def run(service, method, *args, client=None, **kwargs):
        options = client or {}
        if request.param == "sync":
            return getattr(service.client(**options), method)(*args, **kwargs)
        return asyncio.run(getattr(service.async_client(**options), method)(*args, **kwargs))

    return run


@pytest.fixture(params=["sync", "async"])
def collect(request):
    """All events of a stream, and what ended it."""

    def run(service):
        found = []
        if request.param == "sync":
            try:
                found.extend(service.client().rerank_stream("p", 2, sampling={"seed": 1}))
            except InwardError as error:
                found.append(error)
            return found

        async def ask():
            try:
                async for event in service.async_client().rerank_stream("p", 2, sampling={"seed": 1}):
                    found.append(event)
            except InwardError as error:
                found.append(error)
            return found

        return asyncio.run(ask())

    return run


def pairs(n):
    return [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(n)]


def echo(request):
    return margins(json.loads(request.content)["pairs"])


def test_a_long_list_goes_out_in_batches_and_comes_back_in_order(call):
    service = Service(echo)
    answer = call(service, "margin", pairs(25), client={"batch_size": 4, "concurrency": 3})
    assert [m.margin for m in answer.margins] == list(range(25))
    assert sorted(len(body["pairs"]) for body in service.bodies()) == [1, 4, 4, 4, 4, 4, 4]
    assert answer.usage.prompt_tokens == 14
    assert service.most_at_once <= 3


@pytest.mark.parametrize("elements", [pairs(1)[0], "text", [*pairs(70), ("q", "a", "b")], [None]])
def test_elements_that_are_no_dicts_are_refused_with_what_is_wanted(call, elements):
    service = Service(echo)
    ways = [
        ("margin", elements), ("score", elements), ("reward", elements), ("reward_pairs", elements),
        ("update", "hybrid", 1, elements), ("create_job", "margin", elements),
    ]  # fmt: skip
    for method, *given in ways:
        with pytest.raises(TypeError, match=r"(pairs|items|rows)\.\d+ is of type (str|tuple|NoneType); put"):
            call(service, method, *given)
    assert not service.requests


def test_a_frame_is_refused_with_how_it_can_be_given(call):
    pd = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r'df\.to_dict\("records"\), or use annotate'):
        call(Service(echo), "margin", pd.DataFrame(pairs(2)))


def test_messages_that_are_no_dicts_are_refused_too(call):
    with pytest.raises(TypeError, match=r"prompt\.0 is of type str"):
        call(Service(ranked), "rerank", {"role": "user", "content": "q"}, ["a"])


def test_what_the_service_does_not_know_of_a_row_is_not_sent(call):
    service = Service(echo)
    call(
        service,
        "margin",
        [{"prompt": "1", "chosen": "a", "rejected": "b", "source": "hh", "messages": None}],
        truncate=True,
    )
    assert service.bodies() == [{"pairs": [{"prompt": "1", "chosen": "a", "rejected": "b"}], "truncate": True}]


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_what_a_frame_has_for_an_absent_text_is_not_sent(call, nothing):
    """The row has an error of its own then, and the others are scored."""
    service = Service(in_turn(httpx.Response(200, json=envelope(margins=[{"margin": 1.0}] * 2))))
    row = {"prompt": "q", "chosen": "a", "rejected": nothing, "messages": nothing}
    call(service, "margin", [row, *pairs(1)])
    job = {"id": "a" * 32, "state": "running", "kind": "margin", "rows": 1, "done": 0, "created": 1.0}
    uploaded = Service(in_turn(httpx.Response(201, json=job)))
    call(uploaded, "create_job", "margin", [row])
    assert [service.bodies()[0]["pairs"][0], *uploaded.bodies()] == [{"prompt": "q", "chosen": "a"}] * 2


def test_records_of_a_pandas_frame_are_rows(call):
    pd = pytest.importorskip("pandas")
    for kind in ("object", "string"):
        service = Service(echo)
        frame = pd.DataFrame([*pairs(1), {"prompt": "2", "chosen": None}], dtype=kind)
        call(service, "margin", frame.to_dict("records"))
        assert service.bodies()[0]["pairs"] == [*pairs(1), {"prompt": "2"}], kind


def test_a_number_that_json_has_not_never_leaves(call):
    service = Service(ranked)
    with pytest.raises(ValueError, match="JSON"):
        call(service, "rerank", "q", n=2, sampling={"temperature": float("nan")})
    assert not service.requests


def ranked(request):
    best = {"index": 0, "text": "a", "score": 1.0}
    return httpx.Response(200, json=envelope(results=[best], best=best, pair=None, listwise=False))


def test_candidates_are_a_list_of_texts_whatever_holds_them(call):
    np = pytest.importorskip("numpy")
    service = Service(ranked)
    for candidates in (["a", "b"], ("a", "b"), np.array(["a", "b"]), np.array(["a", "b"], object), iter("ab")):
        call(service, "rerank", "q", candidates)
    assert [body["candidates"] for body in service.bodies()] == [["a", "b"]] * 5
    call(service, "rerank", "q", [])  # the service's to refuse
    call(service, "rerank", "q", n=2)
    assert [body.get("candidates") for body in service.bodies()[5:]] == [[], None]


def test_a_text_is_not_taken_for_the_list_of_its_letters(call):
    service = Service(ranked)
    with pytest.raises(TypeError, match=r"candidates is a list of texts.*\[text\]"):
        call(service, "rerank", "q", "abc")
    for method in ("score", "reward", "reward_pairs"):
        with pytest.raises(TypeError, match="detail is a list"):
            call(service, method, pairs(1), detail="tokens")
    assert not service.requests


def test_a_repeat_has_the_same_idempotency_key_and_another_call_another(call):
    service = Service(in_turn(refused(503, headers={"retry-after": "0"}), httpx.ConnectError("away"), echo))
    call(service, "margin", pairs(1))
    call(service, "margin", pairs(1))
    keys = [request.headers["idempotency-key"] for request in service.requests]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]


def test_an_answer_to_the_repeat_of_a_request_that_is_being_worked_out_is_waited_for(call):
    service = Service(in_turn(httpx.ReadTimeout("slow"), refused(409, headers={"retry-after": "0"}), echo))
    assert call(service, "margin", pairs(1)).margins[0].margin == 0


def test_patience_ends_and_the_last_failure_is_told(call):
    service = Service(in_turn(refused(503, "full")))
    with pytest.raises(Unavailable, match="full") as raised:
        call(service, "margin", pairs(1))
    assert len(service.requests) > 2
    assert raised.value.request_id == "abc"
    assert "abc" in str(raised.value)


def test_a_refusal_is_not_sent_again_and_names_field_code_and_request(call):
    service = Service(in_turn(refused(404, "no head", param="head", code="not_found")))
    with pytest.raises(NotFound) as raised:
        call(service, "score", [{"prompt": "p", "response": "r"}], head="x")
    error = raised.value
    assert (error.status, error.param, error.code, error.request_id, len(service.requests)) == (
        404,
        "head",
        "not_found",
        "abc",
        1,
    )


def test_a_page_of_a_proxy_is_an_error_with_its_status(call):
    service = Service(in_turn(httpx.Response(502, text="<html>bad gateway</html>")))
    with pytest.raises(StatusError, match="502"):
        call(service, "info")


def test_an_answer_that_is_not_the_services_is_said_to_be(call):
    with pytest.raises(UnreadableAnswer):
        call(Service(in_turn(httpx.Response(200, text="<html>"))), "info")
    with pytest.raises(UnreadableAnswer):
        call(Service(in_turn(httpx.Response(200, json={"margins": []}))), "margin", pairs(1))


def test_no_answer_and_a_late_one_are_told_apart_without_the_password(call):
    for failure, kind in ((httpx.ConnectError("refused"), ConnectionFailed), (httpx.ReadTimeout("late"), TimedOut)):
        with pytest.raises(kind) as raised:
            call(Service(in_turn(failure)), "heads")
        assert "service/heads" in str(raised.value)


def test_a_timeout_of_a_call_is_the_services_whose_refusal_is_waited_for(call):
    service = Service(echo)
    call(service, "margin", pairs(1), timeout=7)
    assert service.bodies()[0]["timeout"] == 7.0
    assert service.requests[0].extensions["timeout"] == {"connect": 5, "read": 7 + ANSWER_S, "write": 7, "pool": 7}
    call(service, "margin", pairs(1))
    assert "timeout" not in service.bodies()[1]


def test_a_timeout_that_is_not_told_to_the_service_is_the_connections(call):
    service = Service(in_turn(httpx.Response(200, json={})))
    call(service, "info", timeout=7)
    call(service, "info", client={"timeout": 9})
    assert [request.extensions["timeout"]["read"] for request in service.requests] == [7, 9]


def test_new_fields_of_a_newer_service_are_left_out(call):
    body = envelope(margins=[{"margin": 1.5, "shade": "blue", "error": None}], weather="mild")
    body["head"]["colour"] = "red"
    answer = call(Service(in_turn(httpx.Response(200, json=body))), "margin", pairs(1))
    assert answer.margins[0].margin == 1.5
    assert answer.head.version == 1


def test_items_that_cant_be_scored_keep_their_place_and_the_others_their_scores(call):
    """The service refuses a request of which it can score nothing; in a longer list that is the error of those items
    only."""

    def answer(request):
        asked = json.loads(request.content)["pairs"]
        if all(int(pair["prompt"]) in (4, 5, 6, 7) for pair in asked):
            return refused(422, f"bad {asked[0]['prompt']}", param="pairs.0.chosen", code="invalid_field")
        return margins(asked)

    answer = call(Service(answer), "margin", pairs(12), client={"batch_size": 4, "concurrency": 2})
    assert [m.margin for m in answer.margins] == [0, 1, 2, 3, None, None, None, None, 8, 9, 10, 11]
    assert [m.error.param for m in answer.margins if m.error] == [f"pairs.{i}.chosen" for i in (4, 5, 6, 7)]
    assert answer.margins[5].error.message == "bad 5"


def test_an_error_inside_a_batch_names_the_place_in_the_whole_list(call):
    def answer(request):
        found = [{"margin": None, "error": {"message": "no", "type": "t", "param": "pairs.1.chosen", "code": "c"}}]
        return httpx.Response(200, json=envelope(margins=[{"margin": 1.0}, *found]))

    answer = call(Service(answer), "margin", pairs(6), client={"batch_size": 2})
    assert [m.error and m.error.param for m in answer.margins] == [
        None,
        "pairs.1.chosen",
        None,
        "pairs.3.chosen",
        None,
        "pairs.5.chosen",
    ]


def test_the_message_of_an_error_names_that_place_too(call):
    def answer(request):
        asked = json.loads(request.content)["pairs"]
        if all("chosen" in pair for pair in asked):
            return margins(asked)
        n = next(n for n, pair in enumerate(asked) if "chosen" not in pair)
        return refused(422, f"pairs.{n}.chosen is missing", param=f"pairs.{n}.chosen", code="invalid_field")

    rows = [pair if n not in (3, 6) else {"prompt": "q"} for n, pair in enumerate(pairs(8))]
    answer = call(Service(answer), "margin", rows, client={"batch_size": 4})
    messages = [m.error.message for m in answer.margins if m.error]
    assert messages == ["pairs.3.chosen is missing", "pairs.6.chosen is missing"]


def test_a_message_that_begins_with_another_path_is_kept(call):
    def answer(request):
        one = {"message": "pairs.10 is like it", "type": "t", "param": "pairs.1", "code": "c"}
        return httpx.Response(200, json=envelope(margins=[{"margin": 1.0}, {"margin": None, "error": one}]))

    error = call(Service(answer), "margin", pairs(4), client={"batch_size": 2}).margins[3].error
    assert (error.message, error.param) == ("pairs.10 is like it", "pairs.3")


def test_if_nothing_can_be_scored_the_first_error_is_raised(call):
    service = Service(lambda r: refused(422, json.loads(r.content)["pairs"][0]["prompt"], param="pairs.0.prompt"))
    with pytest.raises(InvalidField, match="0") as raised:
        call(service, "margin", pairs(5), client={"batch_size": 2})
    assert [one.message for one in raised.value.each] == [pair["prompt"] for pair in pairs(5)]


def test_a_body_that_is_too_large_is_halved(call):
    def answer(request):
        asked = json.loads(request.content)["pairs"]
        return refused(413) if len(asked) > 3 else margins(asked)

    assert [m.margin for m in call(Service(answer), "margin", pairs(10)).margins] == list(range(10))
    with pytest.raises(TooLarge):
        call(Service(in_turn(refused(413))), "margin", pairs(1))


def test_a_part_that_takes_too_long_is_halved_and_not_sent_again_as_it_is(call):
    def answer(request):
        asked = json.loads(request.content)["pairs"]
        return refused(504, code="deadline_exceeded") if len(asked) > 2 else margins(asked)

    service = Service(answer)
    assert [m.margin for m in call(service, "margin", pairs(8)).margins] == list(range(8))
    assert sorted(len(body["pairs"]) for body in service.bodies()) == [2, 2, 2, 2, 4, 4, 8]
    slow = Service(in_turn(refused(504, "not done", code="deadline_exceeded")))
    with pytest.raises(DeadlineExceeded, match="not done"):
        call(slow, "margin", pairs(1))
    assert len(slow.requests) == 1


def test_a_wrong_option_ends_the_call_at_once(call):
    service = Service(in_turn(refused(422, "head", param="head")))
    with pytest.raises(InvalidField):
        call(service, "margin", pairs(100), client={"batch_size": 1, "concurrency": 2})
    assert len(service.requests) <= 4


def test_an_empty_list_is_the_services_to_refuse(call):
    service = Service(in_turn(refused(422, "must not be empty", param="pairs")))
    with pytest.raises(InvalidField, match="empty"):
        call(service, "margin", [])
    assert len(service.requests) == 1


def test_one_version_answers_the_whole_list(call):
    """The head is switched after the second part; what was answered before it is asked again."""
    asked = []

    def answer(request):
        asked.append(json.loads(request.content)["pairs"])
        return margins(asked[-1], version=1 if len(asked) <= 2 else 2)

    answer = call(Service(answer), "margin", pairs(8), client={"batch_size": 2, "concurrency": 1})
    assert answer.head.version == 2
    assert [m.margin for m in answer.margins] == list(range(8))
    assert len(asked) == 6


def test_a_head_that_never_rests_is_given_up(call):
    versions = iter(range(1000))
    service = Service(lambda r: margins(json.loads(r.content)["pairs"], version=next(versions)))
    with pytest.raises(Unavailable, match="switched"):
        call(service, "margin", pairs(8), client={"batch_size": 2, "concurrency": 1})


def test_a_bulk_upload_is_jsonl_and_is_not_sent_twice_once_it_may_have_arrived(call):
    job = {"id": "a" * 32, "state": "running", "kind": "score", "rows": 2, "done": 0, "created": 1.0}
    service = Service(in_turn(refused(503, headers={"retry-after": "0"}), httpx.Response(201, json=job)))
    rows = [{"prompt": "p", "response": "r", "id": 7}, {"messages": [], "response": None}]
    assert call(service, "create_job", "score", rows, head="h").rows == 2
    request = service.requests[-1]
    assert request.url.params["kind"] == "score"
    assert request.url.params["head"] == "h"
    assert request.content == b'{"prompt": "p", "response": "r"}\n{"messages": []}\n'
    lost = Service(in_turn(httpx.ReadTimeout("late")))
    with pytest.raises(TimedOut):
        call(lost, "create_job", "score", rows, key="mine")
    assert [request.headers["idempotency-key"] for request in lost.requests] == ["mine"]


def test_results_of_a_bulk_job_are_read_line_by_line(call):
    lines = '{"index": 0, "score": 1.0}\n{"index": 1, "error": {"message": "a\u2028b"}}\n'
    service = Service(
        in_turn(httpx.Response(200, content=lines.encode(), headers={"content-type": "application/x-ndjson"}))
    )
    assert [row["index"] for row in call(service, "job_results", "a" * 32)] == [0, 1]


def test_health_says_why_not(call):
    assert call(Service(in_turn(httpx.Response(200, json={"status": "ready"}))), "health") == Health(True, "ready")
    assert call(Service(in_turn(refused(503, "shutting down"))), "health") == Health(False, "shutting down")


def test_key_and_address_come_from_the_environment_and_the_key_is_not_shown(call, monkeypatch):
    monkeypatch.setenv("INWARD_API_KEY", "from-environment")
    service = Service(in_turn(httpx.Response(200, json={})))
    call(service, "info")
    call(service, "info", client={"api_key": "given", "headers": {"x-team": "blue"}})
    assert [r.headers["authorization"] for r in service.requests] == ["Bearer from-environment", "Bearer given"]
    assert service.requests[1].headers["x-team"] == "blue"
    assert "from-environment" not in repr(service.async_client()._core)


@pytest.mark.parametrize("url", ["localhost:8080", "http://", "https:///v1", "http://:8080", "http://host:port"])
def test_an_address_that_is_none_is_refused_at_once(url):
    for client in (Inward, AsyncInward):
        with pytest.raises(ValueError, match="url"):
            client(url)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_in_which_nothing_can_be_done_is_refused_and_not_tried(call, timeout):
    service = Service(echo)
    for method, given in (("margin", [pairs(1)]), ("info", [])):
        with pytest.raises(ValueError, match=r"timeout must be .* above 0"):
            call(service, method, *given, timeout=timeout)
    with pytest.raises(ValueError, match="timeout"):
        call(service, "info", client={"timeout": timeout})
    assert not service.requests


def test_the_progress_bar_ends_at_the_number_of_pairs(call, capsys):
    call(Service(echo), "margin", pairs(9), client={"batch_size": 2}, progress=True)
    assert "9/9" in capsys.readouterr().err


def stream(*events):
    """As the service sends it, with its comments and its end."""
    lines = "".join(f": still there\n\nevent: {name}\ndata: {json.dumps(body)}\n\n" for name, body in events)
    return httpx.Response(
        200, text=f"{lines}data: [DONE]\n\n", headers={"content-type": "text/event-stream", "x-request-id": "abc"}
    )


def test_a_stream_gives_each_answer_and_the_ranking_in_the_end(collect):
    best = {"index": 1, "text": "b", "score": 2.0}
    result = envelope(results=[best, {"index": 0, "text": "a", "score": 1.0}], best=best, pair=None, listwise=False)
    events = [
        ("sample", {"index": 0, "text": "a", "score": 1.0}),
        ("news", {"of": "later"}),
        ("sample", best),
        ("result", result),
    ]
    service = Service(in_turn(refused(503, headers={"retry-after": "0"}), stream(*events)))
    first, second, last = collect(service)
    assert [type(event) for event in (first, second, last)] == [Ranked, Ranked, RerankAnswer]
    assert (first.text, second.score, last.best.index) == ("a", 2.0, 1)
    assert [body["stream"] for body in service.bodies()] == [True, True]
    assert "idempotency-key" not in service.requests[0].headers


def test_a_stream_that_breaks_off_raises_after_what_came(collect):
    sample = ("sample", {"index": 0, "text": "a"})
    error = ("error", {"error": {"message": "died", "type": "t", "param": None, "code": "engine_dead"}})
    found, failure = collect(Service(in_turn(stream(sample, error))))
    assert found.text == "a"
    assert isinstance(failure, Unavailable)
    assert failure.request_id == "abc"
    found, failure = collect(Service(in_turn(stream(sample))))
    assert isinstance(failure, UnreadableAnswer)


def test_a_stream_that_does_not_begin_is_refused_as_any_request_is(collect):
    assert isinstance(collect(Service(in_turn(refused(404))))[0], NotFound)
    assert isinstance(collect(Service(in_turn(httpx.ConnectError("away"))))[0], ConnectionFailed)
