"""Encoder-decoders: teacher-forced logits and greedy answers of a source, under onnxruntime or whatever else computes them.

No torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Unpack

import numpy as np
import onnxruntime as ort

from qft.bundle.session import FLOATS, SessionKeys, open_session, past_device, run_bound
from qft.data.audio import Clip, log_mel, samples
from qft.data.sequences import Given, Source, positions
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError

_MOST_POSITIONS = 6_000  # of the sources fed together: attention over Whisper's 1,500 takes 54 MB a layer of each
_MOST_SOURCES = 64


def _cuts(sources: Sequence[Source]) -> list[slice]:
    """Neighbours that are fed together, in order: few long ones, many short ones."""
    cuts, start, longest = [], 0, 0
    for number, source in enumerate(sources):
        longest, count = max(longest, positions(source)), number - start + 1
        if count > 1 and (count > _MOST_SOURCES or count * longest > _MOST_POSITIONS):
            cuts.append(slice(start, number))
            start, longest = number, positions(source)
    return [*cuts, slice(start, len(sources))] if sources else []


class Network(Protocol):
    """The two halves of a model. A state is what the encoder makes of one source; a cache is the network's own affair."""

    def encode(self, sources: Sequence[Source]) -> list[Any]:
        """Each source's state."""

    def decode(self, ids: np.ndarray, states: Sequence[Any], cache: Any) -> tuple[np.ndarray, Any]:
        """Feed int64 (rows, width) after what the cache holds (None: nothing); float32 logits (rows, width, vocabulary)."""


@dataclass(frozen=True)
class Rules:
    """What a model never writes, as its generation_config says: ids never chosen, and ids not chosen first."""

    never: tuple[int, ...] = ()
    not_first: tuple[int, ...] = ()

    @classmethod
    def of(cls, generation: dict[str, Any]) -> Rules:
        """As a generation_config says."""
        words = generation.get("bad_words_ids") or ()  # as Marian says that padding is never written
        never = (*(generation.get("suppress_tokens") or ()), *(word[0] for word in words if len(word) == 1))
        return cls(never, tuple(generation.get("begin_suppress_tokens") or ()))

    def choose(self, logits: np.ndarray, *, first: bool) -> list[int]:
        """The likeliest allowed id of each row of logits (rows, vocabulary)."""
        allowed = logits.copy()
        allowed[:, list(self.never)] = -np.inf
        if first:
            allowed[:, list(self.not_first)] = -np.inf
        return allowed.argmax(-1).tolist()


class Seq2SeqRunner:
    """Runs a network over rows of `Given`. The states of the sources asked about last are kept for the next question."""

    def __init__(self, network: Network, rules: Rules) -> None:
        self.network = network
        self.rules = rules
        self._states: dict[Source, Any] = {}

    def logits(self, rows: Sequence[Given], keep: int) -> np.ndarray:
        """float32 (rows, keep, vocabulary): logits at the last `keep` positions of every row; before a short row's are zeros."""
        states, parts = self._encoded([row.source for row in rows]), []
        for cut in _cuts([row.source for row in rows]):
            some = rows[cut]
            width = max(map(len, some))
            ids = np.array([[*row.ids, *[row.ids[-1]] * (width - len(row))] for row in some], dtype=np.int64)
            found, _ = self.network.decode(ids, [states[row.source] for row in some], None)
            for row, values in zip(some, found, strict=True):
                kept = values[max(0, len(row) - keep) : len(row)]
                parts.append(np.pad(kept, ((keep - len(kept), 0), (0, 0))))
        return np.stack(parts)

    def generate(self, prompts: Sequence[Given], *, max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        """Greedy answers; each ends with its stop token if one came. All prompts are of one length."""
        states, out = self._encoded([prompt.source for prompt in prompts]), []
        for cut in _cuts([prompt.source for prompt in prompts]):
            some = prompts[cut]
            out += self._written(some, [states[p.source] for p in some], max_new_tokens, stop_ids)
        return out

    def _written(
        self, prompts: Sequence[Given], states: list[Any], max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        out: list[list[int]] = [[] for _ in prompts]
        ids, cache = np.array([prompt.ids for prompt in prompts], dtype=np.int64), None
        for count in range(max_new_tokens):
            logits, cache = self.network.decode(ids, states, cache)
            tokens = self.rules.choose(logits[:, -1], first=count == 0)
            for row, token in zip(out, tokens, strict=True):
                if not row or row[-1] not in stop_ids:
                    row.append(token)
            if all(row[-1] in stop_ids for row in out):
                break
            ids = np.array(tokens, dtype=np.int64)[:, None]
        return out

    def _encoded(self, sources: Sequence[Source]) -> dict[Source, Any]:
        self._states = {source: self._states[source] for source in sources if source in self._states}
        missing = [source for source in dict.fromkeys(sources) if source not in self._states]
        for cut in _cuts(missing):
            some = missing[cut]
            self._states |= zip(some, self.network.encode(some), strict=True)
        return self._states


def speech_prompt(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """What an English Whisper's decoder begins with: a transcript without timestamps. Raises InputError for another model."""
    found = [tokenizer.token_id(name) for name in ("<|startoftranscript|>", "<|notimestamps|>")]
    if None in found:
        raise InputError("the tokenizer is not Whisper's", where="model")
    return tuple(number for number in found if number is not None)


Reader = Callable[[Sequence[Source]], dict[str, np.ndarray]]  # sources → what the encoder is fed, by name


@dataclass(frozen=True)
class SpeechReader:
    """Clips of at most `seconds` → input_features, float32 (clips, mel bins, 100 · seconds)."""

    mel_bins: int
    seconds: int

    @classmethod
    def load(cls, folder: Path) -> SpeechReader:
        """As a bundle's preprocessor_config.json says."""
        found = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        return cls(found["feature_size"], found["chunk_length"])

    def __call__(self, sources: Sequence[Source]) -> dict[str, np.ndarray]:
        clips = [source for source in sources if isinstance(source, Clip)]
        return {"input_features": np.stack([log_mel(samples(clip), self.mel_bins, self.seconds) for clip in clips])}


@dataclass(frozen=True)
class TextReader:
    """Token ids → input_ids and attention_mask, int64 (texts, longest), filled up on the right."""

    pad_id: int

    def __call__(self, sources: Sequence[Source]) -> dict[str, np.ndarray]:
        texts = [source for source in sources if isinstance(source, tuple)]
        width = max(map(len, texts))
        ids = [[*text, *[self.pad_id] * (width - len(text))] for text in texts]
        mask = [[1] * len(text) + [0] * (width - len(text)) for text in texts]
        return {"input_ids": np.array(ids, dtype=np.int64), "attention_mask": np.array(mask, dtype=np.int64)}


class OnnxNetwork:
    """An encoder and a merged decoder with past, as optimum exports them."""

    def __init__(
        self,
        encoder: Path,
        decoder: Path,
        *,
        reader: Reader,
        provider: str = "cpu",
        **session: Unpack[SessionKeys],
    ) -> None:
        """Raises InputError as `open_session` does."""
        (self.encoder, self.threads), (self.decoder, _) = (
            open_session(model, provider=provider, **session) for model in (encoder, decoder)
        )
        self.reader = reader
        self._past_device = past_device(provider)
        self._outputs = [o.name for o in self.decoder.get_outputs()]
        self._inputs = {i.name for i in self.decoder.get_inputs()}
        self._past = {
            i.name: (i.shape, FLOATS[i.type])
            for i in self.decoder.get_inputs()
            if i.name.startswith("past_key_values.")
        }

    def encode(self, sources: Sequence[Source]) -> list[np.ndarray]:
        """float32 (positions, width) of each, without those that only fill up."""
        fed = self.reader(sources)
        (hidden,) = self.encoder.run(["last_hidden_state"], fed)
        lengths = fed["attention_mask"].sum(-1) if "attention_mask" in fed else [hidden.shape[1]] * len(hidden)
        return [state[:length] for state, length in zip(hidden, lengths, strict=True)]

    def decode(self, ids: np.ndarray, states: Sequence[np.ndarray], cache: Any) -> tuple[np.ndarray, Any]:
        """See `Network`. cache: OrtValues by the name of their input, and what the decoder reads of the encoder."""
        if cache is None:
            of_encoder = {
                name: ort.OrtValue.ortvalue_from_numpy(values)
                for name, values in _side_by_side(states).items()
                if name in self._inputs
            }
            empty = {n: np.zeros((len(ids), s[1], 0, s[3]), kind) for n, (s, kind) in self._past.items()}
            past = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in empty.items()}
        else:
            of_encoder, past = cache
        feed = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(ids),
            "use_cache_branch": ort.OrtValue.ortvalue_from_numpy(np.array([cache is not None])),
            **of_encoder,
            **past,
        }
        found = run_bound(self.decoder, feed, self._outputs, stay_on=self._past_device)
        grown = {
            # The branch that reads the cache gives the encoder's part of it back empty: it never changes.
            name: past[name]
            if cache is not None and ".encoder." in name
            else found[name.replace("past_key_values", "present")]
            for name in self._past
        }
        return found["logits"].numpy().astype(np.float32, copy=False), (of_encoder, grown)


def _side_by_side(states: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """States filled up to the longest, float32 (rows, longest, width), and which positions are theirs, int64."""
    longest = max(map(len, states))
    padded = np.stack([np.pad(state, ((0, longest - len(state)), (0, 0))) for state in states])
    mask = np.array([[1] * len(state) + [0] * (longest - len(state)) for state in states], dtype=np.int64)
    return {"encoder_hidden_states": padded, "encoder_attention_mask": mask}
