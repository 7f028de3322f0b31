"""Over HTTP, against a loopback server: asked once, tried again with limits, refused in words, and no key anywhere."""

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from stages.lib.model import chat_endpoint
from stages.lib.model.chat_endpoint import Endpoint, EndpointError, ask, read_key
from stages.lib.run.errors import UserError
from tests.support.chat_server import KEY, MODEL, SNAPSHOT, ChatServer, Fault


@pytest.fixture
def server(monkeypatch):
    with ChatServer(lambda request: f"echo of {request['messages'][0]['content']}") as running:
        for name, value in running.env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(chat_endpoint, "FIRST_WAIT", 0.01)
        yield running


def request(text: str, model: str = MODEL) -> dict:
    return {"model": model, "messages": [{"role": "user", "content": text}]}


def ask_for(requests, folder, retries=2, timeout=5.0, parallel=2):
    return ask(requests, Endpoint.from_environment(retries, timeout), folder, parallel, "ask")


def refused(folder, **how) -> str:
    """The error's text, after a look that neither it nor any file has the key."""
    with pytest.raises(EndpointError) as caught:
        ask_for([request("one")], folder, **how)
    chain, error = "", caught.value
    while error is not None:
        chain += f"{error!r} {error}"
        error = error.__cause__ or error.__context__
    assert KEY not in chain and "\n" not in str(caught.value)
    assert not any(KEY.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return str(caught.value)


def test_replies_stand_in_the_order_of_the_requests(server, tmp_path):
    replies, asked = ask_for([request(f"number {i}") for i in range(9)], tmp_path, parallel=3)
    assert [reply.text for reply in replies] == [f"echo of number {i}" for i in range(9)]
    assert {reply.model for reply in replies} == {SNAPSHOT}
    assert asked == len(server.requests) == 9


def test_what_is_sent_is_the_request_and_nothing_else(server, tmp_path):
    body = request("naïve 🙂 \u2028") | {"temperature": 0.0}
    ask_for([body], tmp_path)
    assert server.requests[0][1] == body


def test_nothing_is_asked_twice_not_even_within_a_run(server, tmp_path, monkeypatch):
    first = ask_for([request("a"), request("b"), request("a")], tmp_path)
    assert first[1] == len(server.requests) == 2
    monkeypatch.delenv("OPENAI_API_KEY")  # what is kept needs no key
    again = ask_for([request("b"), request("a")], tmp_path)
    assert again[1] == 0 and len(server.requests) == 2
    assert [reply.text for reply in again[0]] == ["echo of b", "echo of a"]


@pytest.mark.parametrize("change", [{"temperature": 1.0}, {"messages": []}])
def test_another_request_is_another_question(server, tmp_path, change):
    server.reply = lambda request: "x"
    ask_for([request("a"), request("a") | change], tmp_path)
    assert len(server.requests) == 2


def test_the_same_request_at_another_address_is_another_question(server, tmp_path, monkeypatch):
    ask_for([request("a")], tmp_path)
    with ChatServer(lambda request: "the other") as other:
        monkeypatch.setenv("OPENAI_BASE_URL", other.url)
        assert ask_for([request("a")], tmp_path)[0][0].text == "the other"


def test_no_more_requests_at_a_time_than_allowed(server, tmp_path):
    server.faults.append(Fault(delay=0.05, times=12))
    ask_for([request(str(i)) for i in range(12)], tmp_path, parallel=3)
    assert server.most_open == 3


def test_kept_files_hold_request_and_reply_and_no_key(server, tmp_path):
    ask_for([request("a")], tmp_path)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == {"request": request("a"), "reply": "echo of a", "model": SNAPSHOT}


def test_a_damaged_kept_reply_is_named(server, tmp_path):
    replies, _ = ask_for([request("a")], tmp_path)
    replies[0].path.write_text("{")
    with pytest.raises(UserError, match=f"{replies[0].path.name}: no kept reply .* delete it"):
        ask_for([request("a")], tmp_path)


@pytest.mark.parametrize("content", [None, ""])
def test_an_empty_reply_is_a_reply(server, tmp_path, content):
    server.reply = lambda request: content
    assert ask_for([request("a")], tmp_path)[0][0].text == ""


def test_half_a_surrogate_pair_can_be_kept(server, tmp_path):
    server.reply = lambda request: "half \ud83d"
    assert ask_for([request("a")], tmp_path)[0][0].text == "half ?"


# what passes is tried again


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_fault_is_tried_again(server, tmp_path, status):
    server.faults.append(Fault(status=status, times=2))
    assert ask_for([request("a")], tmp_path)[0][0].text == "echo of a"
    assert len(server.requests) == 3


def test_a_cut_connection_and_a_slow_answer_are_tried_again(server, tmp_path):
    server.faults += [Fault(drop=True), Fault(delay=1.0)]
    assert ask_for([request("a")], tmp_path, timeout=0.3)[0][0].text == "echo of a"
    assert len(server.requests) == 3


def test_tries_have_a_limit(server, tmp_path):
    server.faults.append(Fault(status=503, times=99))
    assert "answered 503: it has trouble: run again later" in refused(tmp_path, retries=3)
    assert len(server.requests) == 4


def test_the_wait_doubles(server, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_endpoint, "FIRST_WAIT", 0.1)
    server.faults.append(Fault(status=500, times=3))
    ask_for([request("a")], tmp_path, retries=3)
    times = [when for when, _ in server.requests]
    waits = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert waits[0] >= 0.1 and waits[1] >= 0.2 and waits[2] >= 0.4


def test_retry_after_in_seconds_is_honoured(server, tmp_path):
    server.faults.append(Fault(status=429, headers={"Retry-After": "1"}))
    ask_for([request("a")], tmp_path)
    assert server.requests[1][0] - server.requests[0][0] >= 1.0


def test_retry_after_as_a_date_is_honoured(server, tmp_path):
    then = format_datetime(
        datetime.now(UTC) + timedelta(seconds=2), usegmt=True
    )  # whole seconds: at least 1 s off
    server.faults.append(Fault(status=503, headers={"Retry-After": then}))
    ask_for([request("a")], tmp_path)
    assert server.requests[1][0] - server.requests[0][0] >= 0.8


def test_a_retry_after_that_says_nothing_is_no_reason_to_stop(server, tmp_path):
    server.faults.append(Fault(status=429, headers={"Retry-After": "soon"}))
    assert ask_for([request("a")], tmp_path)[0][0].text == "echo of a"


def test_an_endpoint_that_asks_for_an_hour_is_left_to_the_next_run(server, tmp_path):
    server.faults.append(Fault(status=429, headers={"Retry-After": "3600"}, times=9))
    assert "lower judge_responses.parallel, wait a while" in refused(tmp_path, retries=5)
    assert len(server.requests) == 1


def test_a_fault_ends_the_others_soon_and_what_came_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_endpoint, "FIRST_WAIT", 30.0)
    ask_for([request("kept")], tmp_path)
    began = time.monotonic()
    server.faults += [
        Fault(status=500),
        Fault(status=400, delay=0.3),
    ]  # one waits for half a minute, one is refused
    with pytest.raises(EndpointError, match="answered 400.*the replies so far are kept"):
        ask_for([request(str(i)) for i in range(20)], tmp_path, parallel=2)
    assert time.monotonic() - began < 10
    assert len(server.requests) <= 4  # 1 + the two + at most one that had begun
    assert ask_for([request("kept")], tmp_path)[1] == 0


# what does not pass names what to do


def test_without_a_key(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert refused(tmp_path).startswith("OPENAI_API_KEY is not set: export the endpoint's key")
    assert not server.requests


@pytest.mark.parametrize("key", [f"{KEY}\nX: y", f"{KEY}é", f"{KEY} {KEY}", f"{KEY}\x00"[:-1] + "\x7f"])
def test_a_key_that_no_header_can_carry_is_refused_unshown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(EndpointError) as caught:
        read_key()
    assert str(caught.value) == "OPENAI_API_KEY holds a character that no key has: copy it anew"


def test_a_line_break_after_the_key_does_no_harm(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    assert ask_for([request("a")], tmp_path)[0][0].text == "echo of a"


def test_a_wrong_key(server, tmp_path):
    server.key = "another"  # the server's message holds the key that was sent
    assert "answered 401: it does not take the key in OPENAI_API_KEY" in refused(tmp_path)
    assert len(server.requests) == 1


def test_an_unknown_model(server, tmp_path):
    with pytest.raises(
        EndpointError, match="answered 404.*does not exist.*no model 'gpt-0'.*judge_responses.model"
    ):
        ask_for([request("a", model="gpt-0")], tmp_path)
    assert len(server.requests) == 1


def test_a_message_that_quotes_the_key_is_shown_without_it(server, tmp_path):
    body = json.dumps({"error": {"message": f"no {KEY}\n\x1b[31m may " + "x" * 900}}).encode()
    server.faults.append(Fault(status=400, body=body))
    said = refused(tmp_path)
    assert '("no [the key] [31m may xxx' in said and len(said) < 700


@pytest.mark.parametrize("body", [b"<html>a gateway</html>", b"[]", b'{"choices": []}', b"\xff", b"null"])
def test_an_answer_of_another_kind(server, tmp_path, body):
    server.faults.append(Fault(status=200, body=body))
    assert "answers, but not as chat completions do: check OPENAI_BASE_URL" in refused(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_error_with_status_200_is_quoted(server, tmp_path):
    server.faults.append(Fault(status=200, body=b'{"error": {"message": "no provider"}}'))
    assert 'not as chat completions do ("no provider")' in refused(tmp_path)


def test_a_redirect_is_not_followed_with_the_key(server, tmp_path):
    server.faults.append(Fault(status=307, headers={"Location": "http://127.0.0.1:9/v1/chat/completions"}))
    assert "answered 307" in refused(tmp_path)


def test_nobody_there(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1?key=" + KEY)
    said = refused(tmp_path)
    assert said.startswith(
        "http://127.0.0.1:9/v1/chat/completions: no connection: start the server, or set OPENAI_BA"
    )


def test_no_answer_in_time(server, tmp_path):
    server.faults.append(Fault(delay=0.6, times=9))
    assert "no answer within 0.2 s: raise judge_responses.timeout" in refused(tmp_path, retries=1, timeout=0.2)


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "ftp://x/v1", "http://", "http://[::1", f"/{KEY}"])
def test_an_address_that_is_none(monkeypatch, url):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(EndpointError, match="OPENAI_BASE_URL is no .*address: set it to .* such as"):
        Endpoint.from_environment(0, 1.0)


def test_an_address_with_a_password(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", f"https://user:{KEY}@example.org/v1")
    with pytest.raises(EndpointError) as caught:
        Endpoint.from_environment(0, 1.0)
    assert KEY not in str(caught.value) and "belongs in OPENAI_API_KEY" in str(caught.value)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (None, "https://api.openai.com/v1/chat/completions"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1/chat/completions"),
        ("https://example.org/a?version=1", "https://example.org/a/chat/completions?version=1"),
    ],
)
def test_the_address_asked(monkeypatch, base, expected):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    if base:
        monkeypatch.setenv("OPENAI_BASE_URL", base)
    assert str(Endpoint.from_environment(0, 1.0).url) == expected
