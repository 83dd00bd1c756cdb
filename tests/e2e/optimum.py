"""Bundles opened by optimum's classes, as what golden cases are checked with. Prompts come one at a time: nothing is filled up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qft.bundle.golden import Agreement, check_cases, from_manifest
from qft.bundle.manifest import Bundle
from qft.data.audio import Clip, log_mel, samples
from qft.data.sequences import Given
from qft.data.windows import text_numbers


def golden_agreement(bundle: Bundle) -> Agreement:
    """How far the bundle's own class of optimum agrees with its golden cases."""
    cases = from_manifest(bundle.manifest)
    assert cases
    runner = _RUNNERS[bundle.manifest["ort_class"]](bundle)
    return check_cases(runner, cases, folder=bundle.folder, stop_ids=bundle.stop_ids)


def opened(bundle: Bundle) -> Any:
    """The model, by the class and the files that the manifest names."""
    from optimum import onnxruntime

    models = {graph: path.name for graph, path in bundle.models.items()}
    if len(models) == 1:
        names = {"file_name": models["model"]}
    else:
        decoder = models["decoder_model_merged"]
        names = {"encoder_file_name": models["encoder_model"], "decoder_file_name": decoder}
        names["decoder_with_past_file_name"] = decoder
    return getattr(onnxruntime, bundle.manifest["ort_class"]).from_pretrained(bundle.folder, subfolder="onnx", **names)


class _OneGraph:
    def __init__(self, bundle: Bundle) -> None:
        self.model, self.pair_mark = opened(bundle), bundle.tokenizer.pair_mark

    def says(self, ids: Sequence[int]) -> Any:
        """Whatever the graph gives for one text."""
        fed = torch.tensor([ids])
        numbers = torch.tensor([text_numbers(ids, self.pair_mark)])
        return self.model(input_ids=fed, attention_mask=torch.ones_like(fed), token_type_ids=numbers)


class _Classifier(_OneGraph):
    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray:
        return np.stack([self.says(row).logits.numpy() for row in rows])

    def generate(self, prompts: Sequence[Sequence[int]], **_: Any) -> list[list[int]]:
        return self.logits(prompts, 1).argmax(-1).tolist()


class _Reader(_OneGraph):
    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray:
        said = [self.says(row) for row in rows]
        return np.concatenate([np.stack([one.start_logits, one.end_logits], 1) for one in said])

    def generate(self, prompts: Sequence[Sequence[int]], **_: Any) -> list[list[int]]:
        return self.logits(prompts, 2).argmax(-1).tolist()


class _Embedder(_OneGraph):
    def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        means = np.stack([self.says(text).last_hidden_state.numpy()[0].mean(0) for text in texts])
        return means / np.linalg.norm(means, axis=1, keepdims=True)


class _Writer:
    def __init__(self, bundle: Bundle) -> None:
        self.model, self.stop_ids = opened(bundle), bundle.stop_ids

    def logits(self, rows: Sequence[Given], keep: int) -> np.ndarray:
        said = [self.model(**_fed(row), decoder_input_ids=torch.tensor([row.ids])).logits for row in rows]
        return np.concatenate([one.numpy()[:, -keep:] for one in said])

    def generate(self, prompts: Sequence[Given], *, max_new_tokens: int, **_: Any) -> list[list[int]]:
        """Whisper's come without what they began with, Marian's with it; an end that transformers took away is put back."""
        out = []
        for prompt in prompts:
            ids = self.model.generate(**_fed(prompt), max_new_tokens=max_new_tokens, num_beams=1)[0].tolist()
            ids = ids[len(prompt.ids) :] if tuple(ids[: len(prompt.ids)]) == tuple(prompt.ids) else ids
            ended = bool(ids) and ids[-1] in self.stop_ids
            out.append(ids if ended or len(ids) == max_new_tokens else [*ids, self.stop_ids[0]])
        return out


def _fed(prompt: Given) -> dict[str, Any]:
    """A text's ids, or what the tests' tiny Whisper hears of a clip: two seconds in 80 mel bins."""
    if isinstance(prompt.source, Clip):
        return {"input_features": torch.from_numpy(log_mel(samples(prompt.source), 80, 2))[None]}
    ids = torch.tensor([prompt.source])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


_RUNNERS = {
    "ORTModelForSequenceClassification": _Classifier,
    "ORTModelForQuestionAnswering": _Reader,
    "ORTModelForFeatureExtraction": _Embedder,
    "ORTModelForSeq2SeqLM": _Writer,
    "ORTModelForSpeechSeq2Seq": _Writer,
}
