"""The server as a process: what it lets in, whom it serves in which order, and how it ends."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from qft.bundle.manifest import Bundle
from tests.serve.conftest import Served, seen_on, serving

pytestmark = pytest.mark.serve
CHAT = {"messages": [{"role": "user", "content": "dull and slow at noon"}], "max_tokens": 8}
QUEUE = 28  # with the four that are answered at once, 32
LIST = {"type": "array", "items": {"type": "integer"}, "minItems": 200}
LONG: dict[str, Any] = {
    "prompt": "a", "max_tokens": 500, "temperature": 2, "seed": 0,
    "response_format": {"type": "json_schema", "json_schema": {"name": "list", "schema": LIST}},
}  # fmt: skip


def until(wanted: Any, seconds: float = 10) -> None:
    """Wait until a condition holds."""
    ends = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < ends, "did not come to be"
        time.sleep(0.05)


def test_health_metrics_and_page_answer(served: Served) -> None:
    before = served.metrics()
    assert served.post("/v1/chat/completions", CHAT).status_code == 200
    assert served.post("/v1/chat/completions", {}).status_code == 400
    after = served.metrics()
    for name, more in (
        ('qft_requests_total{path="/v1/chat/completions",status="200"}', 1),
        ('qft_requests_total{path="/v1/chat/completions",status="400"}', 1),
        ("qft_first_piece_seconds_count", 1),
    ):
        assert after[name] == before.get(name, 0) + more
    assert after['qft_tokens_total{kind="prompt"}'] > before.get('qft_tokens_total{kind="prompt"}', 0)
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "working": 0, "waiting": 0}
    page = httpx.get(served.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "https://" not in page.text.replace("https://github.com/", "")
    assert "src=" not in page.text


def test_the_page_shows_a_conversation_as_it_is_written(served: Served, text_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(text_bundle)
    asked = ["a fine film", "dull"]
    first = next(bundle.answer(asked[:1], bundle.runner(), max_new_tokens=500)).text
    page = seen_on(served.url, tmp_path, *({"text": text} for text in asked))
    assert page["title"] == "tiny"
    assert [who for who, _ in page["seen"]] == ["you", "it", "you", "it"]
    assert [page["seen"][0][1], page["seen"][2][1]] == asked
    assert page["seen"][1][1].split() == first.split()
    assert {"key-field", "context-field", "sound-field", "stop"} <= set(page["hidden"])


def test_labels_that_it_was_tuned_on_are_chosen_from(served: Served) -> None:
    found = served.post("/classify", {"input": ["dull", "a joy"]}).json()["data"]
    assert [one["index"] for one in found] == [0, 1]
    for one in found:
        assert one["probabilities"].keys() == {"positive", "negative"}
        assert one["probability"] == max(one["probabilities"].values()) == one["probabilities"][one["text"]]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", {"content-type": "application/json"}, 400),
        ("POST", "/v1/chat/completions", json.dumps(CHAT).encode(), {"content-type": "text/plain"}, 400),
        ("POST", "/v1/chat/completions", b" " * (1 << 20) + b"{}", {"content-type": "application/json"}, 413),
        ("GET", "/v1/chat/completions", b"", {}, 405),
        ("GET", "/nowhere", b"", {}, 404),
        ("POST", "/translate", b'{"input": "x"}', {"content-type": "application/json"}, 404),
        ("GET", "/v1/models", b"", {"host": "evil.example"}, 403),
        ("GET", "/v1/models", b"", {"host": "[::1"}, 400),
        ("POST", "/classify", b'{"input": "x"}', {"content-type": "application/json", "origin": "https://evil.example"}, 403),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_openais_form(
    served: Served, method: str, path: str, body: bytes, headers: dict, status: int
) -> None:
    found = httpx.request(method, f"{served.url}{path}", content=body, headers=headers)
    assert found.status_code == status
    error = found.json()["error"]
    assert error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_a_body_in_parts_is_counted(served: Served) -> None:
    parts = (b" " * (1 << 16) for _ in range(20))
    found = httpx.post(f"{served.url}/classify", content=parts, headers={"content-type": "application/json"})
    assert found.status_code == 413


def test_it_runs_without_torch_and_ctrl_c_ends_it_at_once_though_answers_are_on_their_way(text_bundle: Path) -> None:
    code = (
        "import atexit; atexit.register(lambda: print("
        "'loaded', [name for name in ('torch', 'transformers', 'peft') if name in sys.modules]))"
    )
    with serving(text_bundle, code=code) as served:
        assert served.post("/v1/chat/completions", CHAT).status_code == 200
        with httpx.stream("POST", f"{served.url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            began = time.monotonic()
            served.process.send_signal(signal.SIGINT)
            told = [line for line in lines if line]
        out, err = served.process.communicate(timeout=20)
        assert time.monotonic() - began < 5
        assert "the server is stopping" in told[-1]
        assert served.process.returncode == 0
        assert out.strip() == "loaded []"
        assert err == ""


def test_who_goes_takes_the_answer_along(served: Served) -> None:
    tokens = 'qft_tokens_total{kind="answer"}'

    def idle() -> bool:
        return httpx.get(f"{served.url}/health").json()["working"] == 0

    until(idle)
    whole = served.post("/v1/completions", LONG).json()["usage"]["completion_tokens"]
    assert whole > 400
    for stream in (True, False):
        before = served.metrics()[tokens]
        if stream:
            with httpx.stream(
                "POST", f"{served.url}/v1/completions", json={**LONG, "stream": True}, timeout=60
            ) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{served.url}/v1/completions", json=LONG, timeout=0.2)
        until(idle, 3)
        assert 0 < served.metrics()[tokens] - before < whole - 100
    assert not [name for name in served.metrics() if name.startswith("qft_requests_total") and 'status="50' in name]


def test_a_wider_address_needs_a_key_and_the_key_is_never_shown(text_bundle: Path) -> None:
    line = [sys.executable, "-m", "qft", "serve", str(text_bundle), "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "can be reached by others, so a key is needed" in done.stderr
    with serving(text_bundle, "--host", "0.0.0.0", key="s3cret-key") as served:
        port = served.url.rpartition(":")[2]
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret-key"}):
            for path in ("/v1/models", "/metrics"):
                found = httpx.get(f"{url}{path}", headers=headers)
                assert found.status_code == 401
                assert found.json()["error"]["code"] == "invalid_api_key"
        right = {"authorization": "Bearer s3cret-key", "host": "my.machine.example"}
        assert httpx.get(f"{url}/v1/models", headers=right).status_code == 200
        served.process.send_signal(signal.SIGTERM)
        out, err = served.process.communicate(timeout=20)
        assert "s3cret" not in out + err + json.dumps(served.card)


def test_an_address_in_use_is_one_message(text_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = [sys.executable, "-m", "qft", "serve", str(text_bundle), "--port", port]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--port 0 takes any that is free" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_short_answer_does_not_wait_for_long_ones(served: Served) -> None:
    with ThreadPoolExecutor(3) as pool:
        began = time.monotonic()
        long = [pool.submit(served.post, "/v1/completions", {**LONG, "seed": n}) for n in range(3)]
        until(lambda: httpx.get(f"{served.url}/health").json()["working"] == 3)
        assert served.post("/v1/chat/completions", CHAT).status_code == 200
        short = time.monotonic() - began
        assert all(one.result().status_code == 200 for one in long)
        assert short < (time.monotonic() - began) / 2


def test_who_goes_while_waiting_leaves_the_place_to_others(text_bundle: Path) -> None:
    with serving(text_bundle, "--queue", "1") as served, ThreadPoolExecutor(4) as pool:
        long = [pool.submit(served.post, "/v1/completions", {**LONG, "seed": n}) for n in range(4)]
        until(lambda: httpx.get(f"{served.url}/health").json()["working"] == 4)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/chat/completions", json=CHAT, timeout=0.2)
        time.sleep(0.1)  # until the server has seen that it went
        assert served.post("/v1/chat/completions", CHAT).status_code == 200
        assert all(one.result().status_code == 200 for one in long)


@pytest.mark.parametrize("each", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_of_32_clients_none_is_starved_and_memory_stays_as_it_was(text_bundle: Path, each: int) -> None:
    """All go on asking until there are `each` answers a client."""
    with serving(text_bundle, "--queue", str(QUEUE)) as served, ThreadPoolExecutor(32) as pool:
        told: list[int] = []  # who was answered, in order

        def ask(number: int) -> None:
            with client_of(served) as client:
                while len(told) < enough:
                    assert said(client, number, most=24) == 200
                    told.append(number)

        process, enough = psutil.Process(served.process.pid), 32 * each
        list(pool.map(ask, range(32)))
        answers = Counter(told[:enough])  # not those that came once the others had gone
        assert min(answers[number] for number in range(32)) >= each / 4, answers
        held, enough = process.memory_info().rss, 2 * 32 * each
        list(pool.map(ask, range(32)))
        more = process.memory_info().rss - held
        assert more < 16e6  # what an allocator keeps for itself, no cache of so many more answers
        metrics = served.metrics()
        assert metrics['qft_requests_total{path="/v1/chat/completions",status="200"}'] == len(told)
        assert metrics["qft_answers_waiting"] == metrics["qft_answers_working"] == 0


def client_of(served: Served) -> closing[http.client.HTTPConnection]:
    """A connection that costs little: what 32 of httpx take would leave the server nothing to be busy with."""
    return closing(http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=60))


def said(client: http.client.HTTPConnection, number: int, *, most: int) -> int:
    """The status of a client's question; every other client has its answer streamed."""
    body = {**CHAT, "max_tokens": most, "temperature": 1.5, "seed": number, "stream": number % 2 == 1}
    client.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    found = client.getresponse()
    text = found.read().decode()
    if found.status == 429:
        assert int(found.headers["retry-after"]) >= 1
        assert json.loads(text)["error"]["code"] == "rate_limit_exceeded"
    elif body["stream"]:
        assert text.count("data: ") > 2
        assert text.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(text)["usage"]["completion_tokens"] > 0
    return found.status


def test_no_more_wait_than_may_and_the_others_are_told_to_come_again(text_bundle: Path) -> None:
    with serving(text_bundle, "--queue", "8") as served, ThreadPoolExecutor(33) as pool:
        left, seen = [32], []

        def watch() -> None:
            with client_of(served) as client:
                while left[0]:
                    client.request("GET", "/health")
                    found = json.loads(client.getresponse().read())
                    seen.append((found["working"], found["waiting"]))

        def ask(number: int) -> int:
            refused = 0
            with client_of(served) as client:
                while said(client, number, most=40) == 429:
                    refused += 1
                    time.sleep(0.2)
            left[0] -= 1
            return refused

        watching = pool.submit(watch)
        assert sum(pool.map(ask, range(32))) > 0
        watching.result()
        assert max(working for working, _ in seen) == 4
        assert max(waiting for _, waiting in seen) > 0
        assert all(working + waiting <= 4 + 8 for working, waiting in seen)
