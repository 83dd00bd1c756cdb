"""A dialogue with a bundle: the same answers as without a cache, whole characters, and it stops when told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from qft.bundle.cache import Cache
from qft.bundle.chat import Conversation
from qft.bundle.manifest import Bundle
from qft.bundle.session import OnnxRunner
from qft.data.tokenizer import Message
from qft.errors import InputError
from tests.e2e.conftest import Type, as_json

LINES = ["a fine film at home", "dull and slow", "what a joy to watch"]


FOLDER = "runs/recipe/bundles/cpu-int4"


@pytest.fixture(scope="module")
def bundle(finished: Path) -> Bundle:
    return Bundle.load(finished / FOLDER)


class Counting(OnnxRunner):
    """Counts the tokens that are read."""

    read = 0

    def _run(self, ids: np.ndarray, *rest: object) -> tuple[np.ndarray, Cache]:
        self.read += ids.size
        return super()._run(ids, *rest)  # type: ignore[arg-type]


def test_every_turn_is_what_the_whole_conversation_gives_and_nothing_is_read_twice(bundle: Bundle) -> None:
    runner = Counting(bundle.models["model"], pad_id=bundle.tokenizer.pad_id)
    talk, tokenizer = Conversation(bundle, runner), bundle.tokenizer
    messages = [Message("system", "Judge.")]
    for line in LINES:
        pieces = list(talk.say(line, max_new_tokens=8))
        messages.append(Message("user", line))
        ids = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
        ((*expected, last),) = bundle.runner().generate([ids], max_new_tokens=8, stop_ids=tokenizer.stop_ids)
        assert talk.turns[-1].ended == (last in tokenizer.stop_ids)
        written = expected if talk.turns[-1].ended else [*expected, last]
        assert "".join(pieces) == talk.turns[-1].answer == tokenizer.decode(written)
        messages.append(Message("assistant", talk.turns[-1].answer))
    assert any(turn.ended for turn in talk.turns)
    assert runner.read <= len(ids) + len(written)


def test_pieces_are_whole_characters(bundle: Bundle) -> None:
    class Scripted(OnnxRunner):
        """Says 好 byte by byte, then stops."""

        says = iter([*bundle.tokenizer.encode("ok 好é"), 2])

        def _run(self, ids: np.ndarray, *rest: object) -> tuple[np.ndarray, Cache]:
            logits, cache = super()._run(ids, *rest)  # type: ignore[arg-type]
            logits[0, -1] = np.arange(logits.shape[-1]) == next(self.says)
            return logits, cache

    talk = Conversation(bundle, Scripted(bundle.models["model"], pad_id=2))
    pieces = list(talk.say("hi", max_new_tokens=20))
    assert "".join(pieces) == "ok 好é"
    assert not any("\ufffd" in piece for piece in pieces)
    assert {"好", "é"} <= set(pieces)


def test_who_stops_listening_keeps_what_was_said(bundle: Bundle) -> None:
    talk = Conversation(bundle, bundle.runner())
    first = next(talk.say(LINES[0], max_new_tokens=8))
    assert talk.turns[-1].answer == first
    assert not talk.turns[-1].ended
    list(talk.say(LINES[1], max_new_tokens=8))
    assert len(talk.turns) == 2


def test_turns_that_no_longer_fit_are_forgotten(bundle: Bundle) -> None:
    talk = Conversation(bundle, bundle.runner())
    for number in range(12):
        list(talk.say(f"{number} a fine film last night with friends", max_new_tokens=8))
    forgotten = talk.forgotten
    assert 0 < forgotten < 12
    with pytest.raises(InputError, match="more than the model's 256"):
        list(talk.say("a fine film " * 100, max_new_tokens=8))
    assert (len(talk.turns), talk.forgotten) == (12, forgotten)  # a line that is refused leaves all as it was


def test_chat_as_typed(finished: Path, typed: Type) -> None:
    found = as_json(typed(finished, f"qft chat {FOLDER} --json --max-new-tokens 8", stdin="\n".join(LINES)))
    assert [turn["user"] for turn in found["turns"]] == LINES
    shown = typed(finished, "qft chat --max-new-tokens 8", stdin="\n".join(LINES)).stdout.splitlines()
    assert [line.removesuffix(" …") for line in shown] == [turn["answer"] for turn in found["turns"]]


def test_a_line_that_is_too_long_is_refused_and_the_dialogue_goes_on(finished: Path, typed: Type) -> None:
    lines = [LINES[0], "a fine film " * 100, LINES[1]]
    done = typed(finished, "qft chat --json --max-new-tokens 8", stdin="\n".join(lines))
    assert [turn["user"] for turn in json.loads(done.stdout)["turns"]] == LINES[:2]
    assert "more than the model's 256" in done.stderr
    assert done.returncode == 2


def test_one_bundle_is_named_at_a_time(finished: Path, typed: Type) -> None:
    twice = typed(finished, f"qft check {FOLDER} --bundle recipe")
    assert twice.returncode == 2
    assert "one bundle at a time" in twice.stderr


# `qft chat` of a model that thinks after its first token for as long as there is a file `wait`, at a terminal of its own.
CHAT_AT_A_TERMINAL = """
import fcntl, sys, termios, time
from pathlib import Path

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from qft.bundle.session import OnnxRunner
from qft.cli import main

run, calls = OnnxRunner._run, []

def thinking(self, *given):
    calls.append(given)
    while len(calls) > 1 and Path("wait").exists():
        time.sleep(0.01)
    return run(self, *given)

OnnxRunner._run = thinking
sys.argv = ["qft", "chat", "--max-new-tokens", "8"]
main()
"""


class Terminal:
    """A terminal with a process at it, as somebody sees and types."""

    def __init__(self, screen: int, process: subprocess.Popen[bytes]) -> None:
        self.process, self._screen, self._shown = process, screen, ""

    def press(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def until(self, text: str) -> str:
        """What is shown until this is."""
        end = time.monotonic() + 60
        while text not in self._shown:
            assert time.monotonic() < end, self._shown
            try:
                self._shown += os.read(self._screen, 4096).decode(errors="replace")
            except OSError:  # nobody is at the other end
                pytest.fail(self._shown)
        before, _, self._shown = self._shown.partition(text)
        return before


@contextmanager
def chatting(folder: Path) -> Iterator[Terminal]:
    screen, other = os.openpty()
    words = [sys.executable, "-c", CHAT_AT_A_TERMINAL]
    process = subprocess.Popen(
        words, cwd=folder, stdin=other, stdout=other, stderr=other, start_new_session=True, close_fds=True
    )
    os.close(other)
    try:
        yield Terminal(screen, process)
    finally:
        process.kill()
        process.wait()
        os.close(screen)
        (folder / "wait").unlink(missing_ok=True)


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
def test_ctrl_c_stops_the_answer_and_the_chat_answers_again(finished: Path) -> None:
    with chatting(finished) as terminal:
        (finished / "wait").touch()
        terminal.until("› ")
        terminal.press(f"{LINES[0]}\n")
        terminal.until("tive")  # positive or negative
        terminal.press("\x03")
        terminal.until(" …\r\n› ")
        (finished / "wait").unlink()
        terminal.press(f"{LINES[1]}\n")
        terminal.until(f"{LINES[1]}\r\n")
        assert terminal.until("\r\n› ") in ("positive", "negative")
        terminal.press(f"{'a fine film ' * 100}\n")  # what goes wrong after a Ctrl-C is not taken for one
        terminal.until("more than the model's 256")
        terminal.until("› ")
        terminal.press("\x04")
        assert terminal.process.wait(60) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
def test_a_terminated_chat_ends_within_an_answer(finished: Path) -> None:
    with chatting(finished) as terminal:
        (finished / "wait").touch()
        terminal.until("› ")
        terminal.press(f"{LINES[0]}\n")
        terminal.until("tive")  # positive or negative
        terminal.process.send_signal(signal.SIGTERM)
        terminal.until("stopped")
        assert terminal.process.wait(60) == 130


def test_a_bundle_without_a_template_does_not_converse(bundle: Bundle, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json", "config.json", "qft.json"):
        (tmp_path / name).write_bytes((bundle.folder / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    with pytest.raises(InputError, match="no chat template"):
        Conversation(Bundle.load(tmp_path), bundle.runner())


def test_an_answer_is_sampled_by_a_seed_and_ends_at_a_stop_text(finished: Path, typed: Type) -> None:
    line = "qft predict --json dull-and-slow --max-new-tokens 24 --temperature 2 --seed"
    first, again, other = (as_json(typed(finished, f"{line} {seed}"))["answers"][0]["text"] for seed in (1, 1, 2))
    assert first == again != other
    stop = first.split()[-1]
    (stopped,) = as_json(typed(finished, f"{line} 1 --stop={stop}"))["answers"]
    assert (stopped["text"], stopped["ended"]) == (first.partition(stop)[0], True)
    talk = as_json(typed(finished, "qft chat --json --max-new-tokens 24 --temperature 2 --seed 1", stdin="dull"))
    assert talk["turns"][0]["answer"]
    for words, said in (("--temperature 3", "from 0 to 2"), ("--labels a,b --seed 1", "a label is not sampled")):
        wrong = typed(finished, f"qft predict x {words}")
        assert wrong.returncode == 2
        assert said in wrong.stderr
