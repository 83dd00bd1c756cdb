"""What a run came to, in one value: the screen, --json and report.html all show this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qft.data.inspect import DataReport
from qft.measure.classification import Calibration, LabelScore
from qft.measure.energy import Energy
from qft.measure.machine import Machine
from qft.measure.parity import Parity
from qft.measure.quality import Quality, RowAnswer, in_percent
from qft.measure.slices import Slice
from qft.measure.speed import AnySpeed, ClassifierSpeed, Speed

_METRIC_NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "f1": "F1",
    "mrr": "MRR",
    "macro_f1": "macro F1",
    "wer": "words wrong",
    "cer": "characters wrong",
}


@dataclass(frozen=True)
class WaterfallStep:
    """Quality after one stage: base, tuned, merged, exported; of a target: rounded, folded, shipped."""

    stage: str
    quality: Quality
    target: str | None = None

    @property
    def name(self) -> str:
        """`shipped (cpu-int4)`."""
        return f"{self.stage} ({self.target})" if self.target else self.stage

    def cells(self) -> dict[str, str]:
        """For a table: the figures that have a meaning for this model and these rows."""
        q = self.quality
        translated = q.bleu is not None  # how near, not whether equal
        looked_for = q.retrieval
        shares = {
            "recall@1": looked_for.recall_1_percent if looked_for else None,
            "recall@5": looked_for.recall_5_percent if looked_for else None,
            "recall@10": looked_for.recall_10_percent if looked_for else None,
            "MRR": looked_for.mrr if looked_for else None,
            "exactly right": q.accuracy_percent,
            "macro F1": q.macro_f1_percent,
            "words wrong": q.word_error_percent,
            "characters wrong": q.character_error_percent,
            "exact match": None if translated else q.exact_match_percent,
            "F1": None if translated else q.f1_percent,
            "a label": q.label_percent,
            "ended": q.ended_percent,
            "right call": q.tool_calls.right_percent if q.tool_calls else None,
            "valid call": q.tool_calls.valid_percent if q.tool_calls else None,
            "false call": q.tool_calls.false_percent if q.tool_calls else None,
            "prefers right": q.preferred_percent,
            "calibration error": q.calibration_error_percent,
            "tokens right": q.token_accuracy_percent if q.accuracy_percent is None else None,
        }
        found = {} if q.perplexity is None or q.accuracy_percent is not None else {"perplexity": f"{q.perplexity:.2f}"}
        found |= {title: f"{score:.2f}" for title, score in (("BLEU", q.bleu), ("chrF", q.chrf)) if score is not None}
        found |= {title: percent(share) for title, share in shares.items() if share is not None}
        return found | {
            "loss": f"{q.loss:.4f}",
            "same first": percent(q.agreement.top1_percent) if q.agreement else "–",
            "KL": f"{q.agreement.kl:.4f}" if q.agreement else "–",
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON: stage, metric, value, loss and the rest of what was measured."""
        quality = asdict(self.quality)
        found = {
            "stage": self.stage,
            "metric": quality.pop("metric"),
            "value": quality.pop("value"),
            "loss": quality.pop("loss"),
        }
        return found | ({"target": self.target} if self.target else {}) | quality


@dataclass(frozen=True)
class Training:
    """How training went. curve: one (step, loss, validation loss or None) a step."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    best_step: int
    trainable_parameters: int
    curve: list[tuple[int, float, float | None]]


@dataclass(frozen=True)
class TargetSize:
    """One bundle: bytes of all its files; bits a quantized weight, scales counted; of a float16 one, modules whose outputs come near
    what float16 holds, with the largest. without_kernel: operator → nodes that its provider has no kernel for; on_cpu: operator →
    nodes that the provider it was timed on left to the processor. threads_tried: threads → speed, where bench.threads is auto.
    """

    bundle_bytes: int
    bits_per_weight: float | None
    large_activations: Mapping[str, float] = field(default_factory=dict)
    without_kernel: Mapping[str, int] = field(default_factory=dict)
    on_cpu: Mapping[str, int] = field(default_factory=dict)
    threads_tried: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A held-out row: the shipped model's answer, what was asked, what was said before tuning (if that was measured) and after.

    Of the prompts, what all begin and end with, the template and the instruction, is left out.
    """

    shipped: RowAnswer
    prompt: str
    before: str
    tuned: str


@dataclass(frozen=True)
class Examples:
    """Held-out rows that the shipped model got right and wrong, and those whose expected answer it finds least likely."""

    right: list[Asked] = field(default_factory=list)
    wrong: list[Asked] = field(default_factory=list)
    hardest: list[Asked] = field(default_factory=list)


@dataclass(frozen=True)
class LabelResults:
    """What a classifier made of its labels, on the test rows. confused: (expected, answered, rows), most frequent first."""

    scores: list[LabelScore]
    confused: list[tuple[str, str, int]]
    calibration: Calibration | None


@dataclass(frozen=True)
class Summary:
    """Parts are None or empty where their stage has not run.

    majority_percent: test rows that the commonest training label is right for; None where rows have no labels.
    """

    name: str
    task: str
    recipe_text: str
    run_folder: str
    overrides: list[str]
    headline_target: str
    waterfall: list[WaterfallStep]
    stage_seconds: Mapping[str, float]
    stage_memory_bytes: Mapping[str, int]
    stage_energy: Mapping[str, Energy]
    sources: list[dict[str, Any]]
    data: DataReport | None
    majority_percent: float | None
    training: Training | None
    merge_way: str | None
    merge_losses: Mapping[str, float]
    finer_layers: Mapping[str, list[str]]
    sizes: Mapping[str, TargetSize]
    speeds: Mapping[str, AnySpeed]
    float_parity: Parity | None
    parities: Mapping[str, Parity]
    worse: Mapping[str, float]
    budget: str
    problems: list[str]
    machine: Machine | None
    versions: Mapping[str, str]
    examples: Examples
    labels: LabelResults | None
    slices: list[Slice]

    @property
    def slice_metric(self) -> str:
        """What `slices` are of: the headline, but of macro F1, which a part of the labels has no use of, the share right."""
        metric = self.waterfall[-1].quality.metric
        return "accuracy" if metric == "macro_f1" else metric

    @property
    def survived_percent(self) -> float | None:
        """Share of the loss that tuning took off the base which is still off in what ships; None if tuning took nothing off."""
        losses = {
            step.stage: step.quality.loss for step in self.waterfall if step.target in (None, self.headline_target)
        }
        if not {"base", "tuned", "shipped"} <= losses.keys() or losses["tuned"] >= losses["base"]:
            return None
        return 100 * (losses["base"] - losses["shipped"]) / (losses["base"] - losses["tuned"])

    @property
    def finer_kinds(self) -> Mapping[str, Mapping[str, int]]:
        """Grid → kind of layer → how many of it the headline target keeps on that finer grid, most first."""
        kinds = {grid: [name.rpartition(".")[2] for name in names] for grid, names in self.finer_layers.items()}
        return {grid: dict(Counter(found).most_common()) for grid, found in kinds.items()}

    @property
    def seconds(self) -> float:
        """Of all stages together, as they last ran."""
        return sum(self.stage_seconds.values())

    @property
    def energy(self) -> Energy:
        """Of all stages together."""
        how = {each.how for each in self.stage_energy.values()}
        return Energy(
            sum(each.joules for each in self.stage_energy.values()), "counted" if how == {"counted"} else "estimated"
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; `bundle_bytes` and speeds are those of the first target."""
        speed, size = self.speeds.get(self.headline_target), self.sizes.get(self.headline_target)
        return {
            "run": self.run_folder,
            "bundle": f"{self.run_folder}/bundles/{self.headline_target}" if size else None,
            "report": f"{self.run_folder}/report.html",
            "waterfall": [step.as_dict() for step in self.waterfall],
            "survived_percent": self.survived_percent,
            "seconds": round(self.seconds, 3),
            "stage_seconds": dict(self.stage_seconds),
            "peak_memory_bytes": max(self.stage_memory_bytes.values(), default=0),
            "stage_peak_memory_bytes": dict(self.stage_memory_bytes),
            "energy": asdict(self.energy),
            "stage_joules": {name: each.joules for name, each in self.stage_energy.items()},
            "bundle_bytes": size.bundle_bytes if size else None,
            "prefill_tokens_per_second": speed.prefill_tokens_per_second.median if isinstance(speed, Speed) else None,
            "decode_tokens_per_second": speed.decode_tokens_per_second.median if isinstance(speed, Speed) else None,
            "texts_per_second": speed.texts_per_second.median if isinstance(speed, ClassifierSpeed) else None,
            "trainable_parameters": self.training.trainable_parameters if self.training else None,
            "train_tokens_per_second": self.training.tokens_per_second if self.training else None,
            "merge": {"way": self.merge_way, "validation_losses": dict(self.merge_losses)} if self.merge_way else None,
            "finer_layers": dict(self.finer_layers),
            "targets": {
                name: asdict(size)
                | ({"speed": asdict(self.speeds[name])} if name in self.speeds else {})
                | (
                    {"parity": asdict(self.parities[name]), "worse_than_tuned": self.worse[name]}
                    if name in self.parities
                    else {}
                )
                for name, size in self.sizes.items()
            },
            "float_parity": asdict(self.float_parity) if self.float_parity else None,
            "data": asdict(self.data) if self.data else None,
            "majority_percent": self.majority_percent,
            "slices": [asdict(one) for one in self.slices],
            "labels": asdict(self.labels) if self.labels else None,
            "problems": self.problems,
            "machine": asdict(self.machine) if self.machine else None,
            "versions": dict(self.versions),
        }


def percent(value: float | None) -> str:
    """A percentage, or a dash where it cannot be told."""
    return "–" if value is None else f"{value:.1f} %"


def metric_name(metric: str) -> str:
    """As people write it."""
    return _METRIC_NAMES.get(metric, metric.replace("_", " "))


def value_text(metric: str, value: float) -> str:
    """A headline metric's value with its unit."""
    return percent(value) if in_percent(metric) else f"{value:.2f}"
