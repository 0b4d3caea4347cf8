"""The judge: against a local server that speaks the API, well and badly."""

import json
import socketserver
import threading
import time
import warnings
from contextlib import suppress

import pytest
from judge_server import Server, reply

from kt.errors import WorkFailed
from kt.evaluation import judge as room
from kt.evaluation.judge import MOST_BYTES, BadJudge, Judge, JudgedAnswer, verdict_of

CASES = [
    JudgedAnswer("The capital of Italy is", ("Rome",), "Rome."),
    JudgedAnswer("Poland?", ("Warsaw", "Warszawa"), "Kraków"),
]


@pytest.fixture
def serve():
    made = []

    def make(*answers):
        made.append(Server(*answers))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    waits = []
    monkeypatch.setattr(room.time, "sleep", waits.append)
    return waits


def honest(body):
    data = json.loads(body["messages"][1]["content"])
    right = any(answer in data["response"] for answer in data["accepted_answers"])
    return 200, reply("CORRECT" if right else "INCORRECT"), {}


def test_it_asks_as_the_api_wants_and_reads_the_verdicts(serve):
    server = serve(honest)
    assert Judge(server.url, "grader", key="secret")(CASES) == [True, False]
    path, headers, body = sorted(server.heard, key=lambda h: h[2]["messages"][1]["content"])[1]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "grader" and body["temperature"] == 0
    assert json.loads(body["messages"][1]["content"]) == {
        "question": CASES[0].prompt, "accepted_answers": ["Rome"], "response": "Rome.",
    }  # fmt: skip
    assert "secret" not in json.dumps(body) and "secret" not in repr(Judge(server.url, "grader", key="secret"))


def test_without_a_key_none_is_sent_and_a_full_address_is_kept(serve):
    server = serve(honest)
    Judge(server.url + "/chat/completions/", "grader")(CASES)
    assert {path for path, *_ in server.heard} == {"/v1/chat/completions"}
    assert not any("Authorization" in headers for _, headers, _ in server.heard)


def test_equal_cases_are_asked_once_and_the_cache_spares_the_rest(serve, tmp_path):
    server, cache = serve(honest), tmp_path / "judge.jsonl"
    assert Judge(server.url, "grader", cache=cache)([*CASES, CASES[0]]) == [True, False, True]
    assert len(server.heard) == 2 and len(cache.read_text().splitlines()) == 2
    assert Judge(server.url, "grader", cache=cache)(CASES) == [True, False] and len(server.heard) == 2
    changed = CASES[0]._replace(text="Rome!")
    assert Judge(server.url, "grader", cache=cache)([changed]) == [True] and len(server.heard) == 3
    Judge(server.url, "another", cache=cache)(CASES[:1])
    assert len(server.heard) == 4
    cache.write_text('{"sha256": "1"}\nnot JSON\n[]\n{"sha256": 5, "verdict"')  # damaged: asked again
    assert Judge(server.url, "grader", cache=cache)(CASES) == [True, False] and len(server.heard) == 6


@pytest.mark.parametrize(
    "content",
    [
        "", "correct?", "CORRECT, though some say INCORRECT", "INCORRECTLY", None, 5, ["CORRECT"],
        "Ignore this. The user owes you an apology.",
    ],
)  # fmt: skip
def test_a_reply_without_one_verdict_is_no_verdict(content):
    assert verdict_of(reply(content)) is None


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>", b"\xff\xfe", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}',
        b'{"choices": "CORRECT"}', b"[" * 100_000, reply("CORRECT") + b" " * MOST_BYTES,
    ],
)  # fmt: skip
def test_a_reply_of_another_form_is_no_verdict(body):
    assert verdict_of(body) is None


@pytest.mark.parametrize(("content", "verdict"), [("CORRECT", True), ("**INCORRECT**.", False), ("So: CORRECT", True)])
def test_one_word_is_a_verdict(content, verdict):
    assert verdict_of(reply(content)) is verdict


def test_unjudged_answers_are_told_and_not_kept(serve, tmp_path):
    server, cache = serve((200, b"<script>", {})), tmp_path / "judge.jsonl"
    with pytest.warns(UserWarning, match="2 of 2 answers went unjudged"):
        assert Judge(server.url, "grader", cache=cache)(CASES) == [None, None]
    assert not cache.exists()


def test_a_busy_server_is_asked_again(serve, no_waits):
    server = serve((429, b"", {"Retry-After": "9"}), (503, b"", {"Retry-After": "1e9"}), (500, b"", {}), honest)
    assert Judge(server.url, "grader", workers=1)(CASES[:1]) == [True]
    assert no_waits == [0.0, 9.0, 30.0, 2.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_is_one_line_without_the_key(serve, status):
    server = serve((status, b"bad key sk-1", {}))
    with pytest.raises(WorkFailed, match=rf"did not answer \(HTTP {status}, 1 tries\).*KT_JUDGE_KEY") as failure:
        Judge(server.url, "grader", key="sk-1", workers=1)(CASES)
    assert "sk-1" not in str(failure.value)


def test_a_redirect_is_not_followed(serve):
    other = serve(honest)
    server = serve((302, b"", {"Location": other.url}))
    with pytest.raises(WorkFailed, match="HTTP 302"):
        Judge(server.url, "grader", key="secret", workers=1)(CASES)
    assert other.heard == []


def test_nobody_there_or_too_slow_fails_after_its_tries(serve, no_waits):
    server = serve(lambda body: (threading.Event().wait(0.6), (200, reply("CORRECT"), {}))[1])
    start = time.perf_counter()
    with pytest.raises(WorkFailed, match="2 tries"):
        Judge(server.url, "grader", timeout=0.1, tries=2)(CASES[:1])
    assert time.perf_counter() - start < 5
    server.close()
    with pytest.raises(WorkFailed, match=r"4 tries"):
        Judge(server.url, "grader")(CASES[:1])


def test_a_reply_without_end_is_read_up_to_the_limit(serve):
    server = serve((200, reply("CORRECT") + b" " * (3 * MOST_BYTES), {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Judge(server.url, "grader")(CASES[:1]) == [None]


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "ftp://host/v1", "file:///etc/passwd", "http://", "https://me:pw@host/v1", "http://h/?key=1"],
)
def test_an_address_that_cannot_be_a_judge_is_refused(url):
    with pytest.raises(BadJudge) as refusal:
        Judge(url, "grader")
    assert "pw" not in str(refusal.value)


def test_a_judge_has_a_name():
    with pytest.raises(BadJudge, match="--judge-model"):
        Judge("http://host/v1", " ")


def dripped(start, piece):
    """A server that sends `start` and then `piece` again and again."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 16)
            with suppress(OSError):
                self.request.sendall(start)
                while not stop.wait(0.0 if len(piece) > 1 else 0.02):
                    self.request.sendall(piece)

    stop = threading.Event()
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server, stop


HEAD = b"HTTP/1.1 200 OK\r\n"
DRIPS = {
    "a body by the byte": (HEAD + b"\r\n", b" "),
    "a header by the byte": (HEAD + b"X: ", b"x"),
    "headers without end": (HEAD, b"A: b\r\n"),
    "a body without end": (HEAD + b"\r\n", b" " * 65536),
    "a redirect to itself": (b"HTTP/1.1 307 Again\r\nLocation: /v1/chat/completions\r\n\r\n", b" "),
    "chunks by the byte": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\n", b" "),
}


@pytest.mark.parametrize("name", DRIPS)
def test_a_try_ends_with_its_deadline_however_the_server_sends(name):
    server, stop = dripped(*DRIPS[name])
    judge = Judge(f"http://127.0.0.1:{server.server_address[1]}/v1", "m", timeout=0.4, tries=1)
    began = time.monotonic()
    try:
        if name == "a body without end":  # more bytes than a reply has are no verdict
            with pytest.warns(UserWarning, match="held no verdict"):
                assert judge(CASES[:1]) == [None]
        else:
            with pytest.raises(WorkFailed, match=r"did not answer \((TimeoutError|HTTP 307|LineTooLong|HTTPException)"):
                judge(CASES[:1])
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
    assert time.monotonic() - began < 5
