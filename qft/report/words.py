"""What a run's figures say in words: one sentence that sums it up, and what to try next, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qft.measure.energy import watt_hours
from qft.measure.quality import higher_is_better, in_percent
from qft.measure.speed import mb
from qft.report.summary import Summary, metric_name, percent, value_text

_STILL_FALLING = 0.02  # of the loss, from one look at the validation rows to the last
_TOO_MUCH_POINTS = 1.0  # that shipping may cost before it is worth more bits


@dataclass(frozen=True)
class Knobs:
    """Keys of the recipe that advice turns, as they were."""

    epochs: float
    fold_steps: int
    grid: str
    targets: Sequence[str]
    class_weights: str
    max_length: int


@dataclass(frozen=True)
class Advice:
    """What to try, what to type for it, and the measured reason."""

    what: str
    typed: str
    why: str


def sentence(s: Summary) -> str:
    """The run in a sentence, as far as it went; empty if nothing is measured."""
    found = {step.stage: step.quality for step in s.waterfall if step.target in (None, s.headline_target)}
    told = [(stage, found[stage]) for stage in ("base", "tuned", "shipped") if stage in found]
    if not told:
        return ""
    metric, rows = told[-1][1].metric, told[-1][1].rows
    shares = {stage: value_text(metric, quality.value) for stage, quality in told}
    size = s.sizes.get(s.headline_target)
    names = {
        "base": "before tuning",
        "tuned": "after it" if "base" in found else "after tuning",
        "shipped": f"in the {mb(size.bundle_bytes)} that ship" if size else "as shipped",
    }
    parts = [f"{value} {names[stage]}" for stage, value in shares.items()]
    what = "right answers" if metric == "accuracy" else metric_name(metric)
    text = f"{what} on {rows:,} held-out rows: {_listed(parts)}"
    if s.headline_target in s.speeds:
        text += f", at {s.speeds[s.headline_target].headline} on this machine"
    return f"{text[0].upper()}{text[1:]}. Made in {s.seconds / 60:.1f} minutes with {watt_hours(s.energy)}."


def advice(s: Summary, knobs: Knobs) -> list[Advice]:
    """What the figures suggest, the most promising first; empty where they suggest nothing."""
    return [one for rule in _RULES for one in rule(s, knobs)]


def _validation(s: Summary) -> list[tuple[int, float]]:
    return [(step, held_out) for step, _, held_out in s.training.curve if held_out is not None] if s.training else []


def _perfect(s: Summary) -> bool:
    """Whether nothing is left to be learnt that these test rows could show."""
    quality = s.waterfall[-1].quality if s.waterfall else None
    if quality is None or not in_percent(quality.metric):
        return False
    return quality.value > 99.5 if higher_is_better(quality.metric) else quality.value < 0.5


def _epochs(s: Summary, knobs: Knobs) -> Iterator[Advice]:
    looks = _validation(s)
    if len(looks) < 2 or _perfect(s):
        return
    (_, before), (last_step, last) = looks[-2:]
    best_step, best = min(looks, key=lambda look: look[1])
    if best_step == last_step and before - last > _STILL_FALLING * before:
        yield Advice(
            "Train longer",
            f"training.epochs={_number(2 * knobs.epochs)}",
            f"the validation loss was still falling at the end, from {before:.4f} to {last:.4f} between the last two looks",
        )
    elif last - best > _STILL_FALLING * best:
        yield Advice(
            "Train shorter, or on more rows",
            f"training.epochs={_number(max(0.1, round(knobs.epochs * best_step / last_step, 1)))}",
            f"the validation loss was least at step {best_step:,} of {last_step:,} ({best:.4f}) and rose to {last:.4f}: what came "
            "after it is not in the bundle",
        )


def _learnt_by_heart(s: Summary, knobs: Knobs) -> Iterator[Advice]:
    looks = _validation(s)
    if not looks or s.training is None or _perfect(s):
        return
    losses = [loss for _, loss, _ in s.training.curve][-max(1, len(s.training.curve) // 10) :]
    mean = sum(losses) / len(losses)
    if mean < 0.5 * looks[-1][1]:
        yield Advice(
            "Give it more rows, or hold it back",
            "lora.dropout=0.1",
            f"at the end the training rows had a loss of {mean:.4f}, rows it had not seen {looks[-1][1]:.4f}: it knows them by heart",
        )


def _shipping(s: Summary, knobs: Knobs) -> Iterator[Advice]:
    steps = {step.stage: step.quality for step in s.waterfall if step.target in (None, s.headline_target)}
    if not {"tuned", "shipped"} <= steps.keys():
        return
    tuned, shipped = steps["tuned"], steps["shipped"]
    sign = 1 if higher_is_better(tuned.metric) else -1
    lost = sign * (tuned.value - shipped.value)
    limit = _TOO_MUCH_POINTS if tuned.metric != "perplexity" else 0.03 * tuned.value
    if lost <= limit:
        return
    why = (
        f"{metric_name(tuned.metric)} went from {value_text(tuned.metric, tuned.value)} to "
        f"{value_text(tuned.metric, shipped.value)} on the way into {s.headline_target}"
    )
    if knobs.fold_steps == 0 and knobs.grid != "none":
        yield Advice("Let the codes learn on the grid that ships", "fold.steps=80", why)
    if "cpu-int8" not in knobs.targets:
        yield Advice("Ship 8 bits as well", f"export.targets=[{','.join([*knobs.targets, 'cpu-int8'])}]", why)


def _guessing(s: Summary, knobs: Knobs) -> Iterator[Advice]:
    steps = {step.stage: step.quality for step in s.waterfall}
    right = steps["tuned"].accuracy_percent if "tuned" in steps else None
    if s.majority_percent is None or right is None or right > s.majority_percent + 2:
        return
    yield Advice(
        "Look at the rows first",
        f"qft plan {s.name}",
        f"{percent(right)} are right after tuning, and {percent(s.majority_percent)} would be with the commonest label alone: "
        "labels, columns or the learning rate are likely wrong",
    )


def _rare_labels(s: Summary, knobs: Knobs) -> Iterator[Advice]:
    counts = sorted((s.data.labels if s.data else {}).values())
    if s.labels is None or not counts or counts[-1] < 10 * counts[0] or knobs.class_weights == "balanced":
        return
    rare = [one for one in s.labels.scores if s.data and s.data.labels.get(one.label, 0) * 10 <= counts[-1]]
    if rare and sum(one.f1_percent for one in rare) / len(rare) < 70:
        yield Advice(
            "Let rare labels count as much as common ones",
            "classification.class_weights=balanced",
            f"the commonest label has {counts[-1]:,} rows, the rarest {counts[0]:,}, and F1 of the {len(rare)} rare ones is "
            f"{percent(sum(one.f1_percent for one in rare) / len(rare))}",
        )


def _cut_rows(s: Summary, knobs: Knobs) -> Iterator[Advice]:
    if s.data is None:
        return
    lost, all_rows = s.data.cut + s.data.shortened, s.data.train_rows + s.data.validation_rows + s.data.eval_rows
    if lost > 0.05 * all_rows:
        yield Advice(
            "Let the model see whole rows",
            f"training.max_length={2 * knobs.max_length}",
            f"{lost:,} of {all_rows:,} rows were cut or shortened to {knobs.max_length} tokens",
        )


def _contradictions(s: Summary, knobs: Knobs) -> Iterator[Advice]:
    if s.data is not None and s.data.conflicts > max(5, 0.01 * s.data.rows_read):
        yield Advice(
            "Make equal rows agree",
            f"qft plan {s.name}",
            f"{s.data.conflicts:,} rows have another answer than a row with the same text: no model can learn both",
        )


def _few_test_rows(s: Summary, knobs: Knobs) -> Iterator[Advice]:
    if not s.waterfall or not in_percent(s.waterfall[-1].quality.metric):
        return
    quality = s.waterfall[-1].quality
    share = min(max(quality.value / 100, 0.0), 1.0)
    margin = 100 * _wilson(share, quality.rows)
    if margin > 3:
        yield Advice(
            "Test on more rows",
            "data.eval=1000",
            f"on {quality.rows:,} rows a share of {percent(quality.value)} is known to within {margin:.0f} points "
            "(95 %): smaller differences between runs are chance",
        )


def _wilson(share: float, rows: int) -> float:
    """Half the width of the 95 % interval of a share (Wilson 1927): not nothing even where all is right."""
    z = 1.96
    return z * (share * (1 - share) / rows + z * z / (4 * rows * rows)) ** 0.5 / (1 + z * z / rows)


def _unended(s: Summary, knobs: Knobs) -> Iterator[Advice]:
    ended = s.waterfall[-1].quality.ended_percent if s.waterfall else None
    if ended is not None and ended < 90:
        yield Advice(
            "Show it more whole answers",
            f"training.max_length={2 * knobs.max_length}",
            f"only {percent(ended)} of the written answers were ended by the model itself",
        )


_RULES: Sequence[Callable[[Summary, Knobs], Iterator[Advice]]] = (
    _guessing,
    _epochs,
    _learnt_by_heart,
    _shipping,
    _rare_labels,
    _cut_rows,
    _unended,
    _contradictions,
    _few_test_rows,
)


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _number(value: float) -> str:
    return f"{value:g}"
