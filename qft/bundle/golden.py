"""Golden cases: what the shipped function answers, so that any runtime can be held against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qft.data.audio import Clip
from qft.data.sequences import Given
from qft.files import inside

TOP = 5
CLEAR_MARGIN = 0.5  # where the first choice leads by more than this, every runtime must make it
FREE_MARGIN = 1.0  # cases whose smallest margin is at least this must give equal text when run freely
LEAST_COSINE = 0.99  # of a vector with the golden one; onnxruntime-node came within 0.999 (tests/e2e/test_search.py)
LEAST_POSITIONS = 100  # that a share is judged on: of them two may differ, of 32 none might
_LEAST_CASES = 8
LEAST_AGREEMENT = 0.98  # share of all positions with the same first choice: int8 kernels differ between machines


class Runner(Protocol):
    """What a runtime must do to be held against golden cases."""

    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray: ...

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]: ...


@dataclass(frozen=True)
class GoldenCase:
    """prompt and answer: token ids; top_ids, top_logits: (answer positions, 5), the teacher-forced best logits.

    clip: the sound file inside the bundle that the answer is to, where there is one; source: the token ids of the text.
    embedding: the vector of a prompt that is not answered.
    """

    prompt: list[int]
    answer: list[int]
    text: str
    top_ids: list[list[int]]
    top_logits: list[list[float]]
    free_running: bool
    clip: str | None = None
    source: list[int] | None = None
    embedding: list[float] | None = None

    def fed(self, folder: Path) -> Any:
        """The prompt as a runner is given it. folder: the bundle's."""
        ids = tuple(self.prompt)
        if self.source is not None:
            return Given(tuple(self.source), ids)
        return ids if self.clip is None else Given(Clip(str(inside(folder, self.clip))), ids)


@dataclass(frozen=True)
class Agreement:
    """Positions compared, share with the same first choice, clear positions that differ, free-running texts that differ.

    A vector is one position, the same if its cosine with the golden one is at least `LEAST_COSINE`, else clearly another one.
    """

    positions: int
    agreement: float
    clear_differences: int
    free_cases: int
    free_differences: int

    @property
    def agrees(self) -> bool:
        """DESIGN's definition of a runtime that agrees."""
        return self.agreement >= LEAST_AGREEMENT and not self.clear_differences and not self.free_differences


def make_cases(
    runner: Runner, prompts: Sequence[Any], decode: Any, *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[GoldenCase]:
    """Run each prompt alone, as an app would, until there are `LEAST_POSITIONS`. stop_ids: what ends a written answer; none:
    nothing is written (see below).
    """
    cases: list[GoldenCase] = []
    for prompt in prompts:
        if len(cases) >= _LEAST_CASES and sum(len(case.answer) for case in cases) >= LEAST_POSITIONS:
            break
        answer = runner.generate([prompt], max_new_tokens=max_new_tokens, stop_ids=stop_ids)[0]
        logits = _answer_logits(runner, prompt, answer, written=bool(stop_ids))
        order = np.argsort(-logits, axis=-1)[:, :TOP]
        best = np.take_along_axis(logits, order, -1)
        margin = float((best[:, 0] - best[:, 1]).min())
        cases.append(
            GoldenCase(
                list(prompt.ids if isinstance(prompt, Given) else prompt),
                answer,
                decode(answer),
                order.tolist(),
                np.round(best, 4).tolist(),
                margin >= FREE_MARGIN,
                source=list(prompt.source) if isinstance(prompt, Given) and isinstance(prompt.source, tuple) else None,
            )
        )
    return cases


def embedded_case(runner: Any, prompt: Sequence[int], text: str) -> GoldenCase:
    """The vector of one text, fed alone."""
    vector = np.round(runner.embed([prompt])[0].astype(float), 5).tolist()
    return GoldenCase(list(prompt), [], text, [], [], False, embedding=vector)


def check_cases(runner: Any, cases: Sequence[GoldenCase], *, folder: Path, stop_ids: Sequence[int]) -> Agreement:
    """Hold a runtime against the cases of the bundle in `folder`. stop_ids: as in `make_cases`."""
    same = clear = positions = free = wrong = 0
    for case in cases:
        if case.embedding is not None:
            near = float(runner.embed([case.prompt])[0] @ np.array(case.embedding)) >= LEAST_COSINE
            positions, same, clear = positions + 1, same + near, clear + (not near)
            continue
        chosen = _answer_logits(runner, case.fed(folder), case.answer, written=bool(stop_ids)).argmax(-1)
        for token, ids, logits in zip(chosen, case.top_ids, case.top_logits, strict=True):
            positions += 1
            same += int(token == ids[0])
            clear += int(token != ids[0] and logits[0] - logits[1] > CLEAR_MARGIN)
        if case.free_running:
            free += 1
            out = runner.generate([case.fed(folder)], max_new_tokens=len(case.answer), stop_ids=stop_ids)[0]
            wrong += int(list(out) != list(case.answer))
    return Agreement(positions, same / max(1, positions), clear, free, wrong)


def from_manifest(manifest: dict[str, Any]) -> list[GoldenCase]:
    """The cases stored in qft.json."""
    return [GoldenCase(**case) for case in manifest.get("golden", [])]


def as_json(cases: Sequence[GoldenCase]) -> list[dict[str, Any]]:
    """For qft.json."""
    return [{name: value for name, value in asdict(case).items() if value is not None} for case in cases]


def _answer_logits(runner: Runner, prompt: Any, answer: Sequence[int], *, written: bool) -> np.ndarray:
    """float32 (answer positions, vocabulary): the logits that choose each part of the answer.

    written: a token, the earlier ones given; otherwise a label or a place, read off the prompt alone.
    """
    return runner.logits([prompt + tuple(answer[:-1] if written else ())], len(answer))[0]
