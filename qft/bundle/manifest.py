"""qft.json: what a bundle is, how good and how fast it was measured, and where it comes from. Opened without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from qft.bundle.assets import read_generation
from qft.bundle.card import model_card
from qft.bundle.classifier import Decision, OnnxClassifier
from qft.bundle.classifier import Labels as LabelNames
from qft.bundle.constrained import Choice, Labels, Schema
from qft.bundle.embedder import Embedding, OnnxEmbedder, embeddings
from qft.bundle.feed import AT_ONCE, Batch, Feed
from qft.bundle.generate import Answer, Writing, side_by_side, tokens
from qft.bundle.hashes import NAME, changed_files, file_hashes
from qft.bundle.lines import conversation_of
from qft.bundle.reader import Found, OnnxReader, Reading, find
from qft.bundle.sampling import GREEDY, Sampler, Sampling
from qft.bundle.seq2seq import OnnxNetwork, Reader, Rules, Seq2SeqRunner, SpeechReader, TextReader, speech_prompt
from qft.bundle.session import OnnxRunner
from qft.data.audio import Clip, cut
from qft.data.conversations import Tool, written_out
from qft.data.examples import around_place
from qft.data.labelled import shortened
from qft.data.passages import NO_ANSWER, Passage
from qft.data.sequences import MOST_TOKENS, Given, source_of, start_of
from qft.data.tokenizer import Message, TextTokenizer
from qft.data.windows import cut_windows
from qft.errors import InputError, Problem
from qft.files import inside, write_json, write_text

_CARD = "README.md"
_RUNNERS: dict[str, type[Any]] = {  # others write: OnnxRunner
    "text-classification": OnnxClassifier,
    "question-answering": OnnxReader,
    "sentence-similarity": OnnxEmbedder,
    "automatic-speech-recognition": Seq2SeqRunner,
    "translation": Seq2SeqRunner,
}


def update(folder: Path, **facts: Any) -> dict[str, Any]:
    """Put facts into qft.json, write the model card that they make, and take the files' hashes anew."""
    path = folder / NAME
    manifest = json.loads(path.read_text("utf-8")) if path.exists() else {}
    manifest |= facts
    if "lineage" in manifest:
        write_text(folder / _CARD, model_card(manifest))
    manifest["files"] = file_hashes(folder)
    write_json(path, manifest)
    return manifest


def size_bytes(folder: Path) -> int:
    """Bytes of all files of a bundle."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


class Bundle:
    """An opened bundle: `bundle = Bundle.load(folder); bundle.classify(["…"], bundle.runner())`, or `answer`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read qft.json. Raises InputError if the folder is no bundle."""
        path = folder / NAME
        try:
            return cls(folder, json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            raise InputError(
                f"{folder} is not a bundle: it holds no {NAME}", hint="a bundle lies in runs/NAME/bundles/TARGET"
            ) from None
        except ValueError as error:
            raise InputError(f"{path} is damaged: {error}") from None

    @property
    def models(self) -> dict[str, Path]:
        """Graph → its ONNX file: one `model`, or an encoder and a decoder."""
        named = self.manifest.get("models") or {"model": self.manifest["model"]}
        return {graph: inside(self.folder, name) for graph, name in named.items()}

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The bundle's tokenizer and chat template."""
        return TextTokenizer.load(self.folder)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends an answer that is written; a label or a place needs no end."""
        return self.tokenizer.stop_ids if self._kind in (OnnxRunner, Seq2SeqRunner) else ()

    @property
    def classifies(self) -> bool:
        """Whether it chooses among labels instead of writing."""
        return self._kind is OnnxClassifier

    @property
    def _kind(self) -> type[Any]:
        return _RUNNERS.get(self.manifest["task"], OnnxRunner)

    @property
    def writes(self) -> bool:
        """Whether it is a language model, which answers in words."""
        return self._kind is OnnxRunner

    @property
    def embeds(self) -> bool:
        """Whether it turns texts into vectors."""
        return self._kind is OnnxEmbedder

    @property
    def labels(self) -> LabelNames:
        """What a classifier chooses from."""
        return LabelNames(tuple(self.manifest["labels"]), self.manifest["several_labels"])

    @property
    def calibration(self) -> dict[str, float]:
        """What divides a classifier's logits, and the least probability to be relied on."""
        return self.manifest.get("calibration") or {"temperature": 1.0, "threshold": 0.0}

    @property
    def known_labels(self) -> list[str]:
        """What a model that writes was tuned to answer with, if it was tuned on labels, one a row."""
        labels = [] if self.manifest["several_labels"] else self.manifest["labels"]
        return labels if self.writes and len(labels) > 1 else []

    @cached_property
    def longest(self) -> int:
        """Tokens that the model can see at once."""
        config = json.loads((self.folder / "config.json").read_text("utf-8"))
        return int(config.get("max_position_embeddings", 2048))

    @property
    def transcribes(self) -> bool:
        """Whether it is given sound files."""
        return self.manifest["task"] == "automatic-speech-recognition"

    def provider_options(self, provider: str) -> dict[str, str]:
        """What the bundle's target has a provider told; nothing if it was made for another one."""
        return dict(self.manifest.get("provider_options", {}).get(provider, {}))

    def runner(self, *, threads: int = 0, provider: str = "cpu") -> Any:
        """A session on the model: an OnnxClassifier, OnnxReader, OnnxEmbedder, Seq2SeqRunner, or an OnnxRunner that writes."""
        told = self.provider_options(provider)
        session: dict[str, Any] = {"threads": threads, "provider": provider, "provider_options": told}
        if self._kind is Seq2SeqRunner:
            encoder, decoder = self.models.values()
            network = OnnxNetwork(encoder, decoder, reader=self.reader, **session)
            return Seq2SeqRunner(network, Rules.of(read_generation(self.folder)))
        options = {"pad_id": self.tokenizer.pad_id, **session}
        if self._kind is OnnxReader:
            options["pair_mark"] = self.tokenizer.pair_mark
        if self.embeds:
            options["temperature"] = self.manifest["keys"]["temperature"]
        return self._kind(self.models["model"], **options)

    @property
    def reader(self) -> Reader:
        """How sound becomes features, or texts a batch of token ids."""
        return SpeechReader.load(self.folder) if self.transcribes else TextReader(self.tokenizer.pad_id)

    def transcribe(self, paths: Sequence[str], runner: Seq2SeqRunner) -> list[Answer]:
        """What is said in each sound file; long ones are cut at quiet places and put together again."""
        answers = []
        for path in paths:
            heard = list(self.heard(path, runner))
            text = " ".join(part.text for part in heard)
            answers.append(Answer(text, all(part.ended for part in heard), sum(part.tokens for part in heard)))
        return answers

    def heard(self, path: str, runner: Seq2SeqRunner) -> Iterator[Answer]:
        """What is said in each part of a sound file, one after another."""
        prompt, stops = speech_prompt(self.tokenizer), self.tokenizer.stop_ids
        most = min(self.manifest["max_length"], MOST_TOKENS) - len(prompt)
        for clip in cut(Clip(path), SpeechReader.load(self.folder).seconds):
            (ids,) = runner.generate([Given(clip, prompt)], max_new_tokens=most, stop_ids=stops)
            yield Answer(self.tokenizer.decode(ids).strip(), ids[-1] in stops, len(ids))

    def translate(self, texts: Sequence[str], runner: Seq2SeqRunner, *, max_new_tokens: int) -> list[Answer]:
        """Each text's translation; of a text longer than training.max_length its beginning's."""
        start, stops, length = start_of(self.tokenizer), self.tokenizer.stop_ids, self.manifest["max_length"]
        given = [Given(source_of(self.content(text), self.tokenizer, length), start) for text in texts]
        most = min(max_new_tokens, MOST_TOKENS - len(start))
        written = runner.generate(given, max_new_tokens=most, stop_ids=stops)
        return [Answer(self.tokenizer.decode(ids).strip(), ids[-1] in stops, len(ids)) for ids in written]

    def classify(self, texts: Sequence[str], runner: OnnxClassifier) -> list[Decision]:
        """Each text's label."""
        calibration, decisions = self.calibration, []
        for text in texts:
            logits = runner.logits([self.read_ids(text)], 1)[0, 0]
            label, probability = self.labels.decide(logits, calibration["temperature"])
            decisions.append(Decision(label, probability, probability >= calibration["threshold"]))
        return decisions

    def embed(self, texts: Sequence[str], runner: OnnxEmbedder) -> list[Embedding]:
        """Each text's vector; of a text longer than training.max_length its beginning's."""
        return embeddings(runner, [self.read_ids(text) for text in texts])

    def find(self, question: str, context: str, runner: OnnxReader) -> Found:
        """The answer to a question in a context of any length."""
        keys = self.manifest["keys"]
        reading = Reading(keys["longest_answer"], keys["no_answer_margin"], NO_ANSWER in self.manifest["labels"])
        passage, length = Passage(question, context, (), ()), self.manifest["max_length"]
        windows, _ = cut_windows(passage, "", self.tokenizer, max_length=length, stride=keys["stride"])
        return find(windows, [runner.logits([window.input_ids], 2)[0] for window in windows], reading)

    def content(self, text: str) -> str:
        """A user's text with the recipe's prompt around it."""
        parts = around_place(self.manifest.get("prompt") or "")
        return f"{parts[0]}{text}{parts[2]}" if parts else text

    def read_ids(self, text: str) -> list[int]:
        """What a model that does not write is fed for a user's text."""
        ids = self.tokenizer.encode(self.content(text), add_special_tokens=True)
        return shortened(ids, self.tokenizer, self.manifest["max_length"])

    def prompt_ids(self, text: str) -> list[int]:
        """What the model is fed for a user's text, in the recipe's prompt and the chat template, or for a conversation.

        That is a JSON line, {"messages": […], "tools": […]}, of which no recipe's prompt is put around any turn.
        """
        messages, tools = conversation_of(text)
        return self.conversation_ids(messages or (Message("user", self.content(text)),), tools)

    def conversation_ids(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """What the model is fed for a conversation; the recipe's system words open one that has none."""
        if not self.tokenizer.has_chat_template:
            joined = "".join(message.content for message in written_out(messages, tools))
            return self.tokenizer.encode(joined, add_special_tokens=True)
        if (system := self.manifest.get("system")) and messages[0].role != "system":
            messages = (Message("system", system), *messages)
        return self.tokenizer.encode(self.tokenizer.render(messages, add_generation_prompt=True, tools=tools))

    def answer(
        self,
        texts: Sequence[str],
        runner: OnnxRunner,
        *,
        max_new_tokens: int,
        schema: Schema | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> Iterator[Answer]:
        """Answers, one a text, in their order; greedy unless `sampling` says otherwise; by a schema, JSON that is valid and whole.

        Some are written at the same time. Each is drawn by a chance of its own: seed plus its text's number.
        """

        def begin(feed: Feed, number: int) -> Writing:
            prompt, sampler = self.prompt_ids(texts[number]), Sampler(sampling.of_answer(number))
            return self.writing(feed, prompt, sampler, max_new_tokens=max_new_tokens, schema=schema, stop=stop)

        batch = Batch(runner)
        return side_by_side([Feed(runner, batch) for _ in range(AT_ONCE)], len(texts), begin)

    def writing(
        self,
        feed: Feed,
        prompt: Sequence[int],
        sampler: Sampler,
        *,
        max_new_tokens: int,
        schema: Schema | None = None,
        stop: Sequence[str] = (),
    ) -> Writing:
        """The answer to a prompt, to be read piece by piece."""
        if schema is None:
            ids = tokens(feed, prompt, sampler, max_new_tokens=max_new_tokens, stop_ids=self.tokenizer.stop_ids)
        else:
            ids = schema.tokens(feed, prompt, sampler, max_new_tokens=max_new_tokens)
        return Writing(ids, self.tokenizer, stop)

    def choose(self, texts: Sequence[str], runner: OnnxRunner, labels: Labels) -> list[Choice]:
        """The likeliest of some labels, one a text."""
        return [labels.choose(runner, self.prompt_ids(text)) for text in texts]

    def problems(self) -> list[Problem]:
        """Files that are missing, changed or not listed; empty if the bundle is as it was made."""
        return changed_files(self.folder, self.manifest.get("files", {}))
