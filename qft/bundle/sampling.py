"""How the next token is chosen: the likeliest, or by chance among the likely ones. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from qft.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the likeliest token; otherwise one by chance, of those that top_k, top_p and min_p leave, in this order.

    top_k: so many of the likeliest (0: all); top_p: the fewest that together have this share; min_p: those at least this
    share of the likeliest one's. repetition_penalty: what a token that stands in prompt or answer is divided by (its logit;
    multiplied where that is below 0). seed: the same one makes the same choices.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a value outside its range."""
        for name, least, most in (
            ("temperature", 0, 2),
            ("top_k", 0, 1 << 31),
            ("top_p", 1e-6, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0.1, 10),
        ):
            if not least <= getattr(self, name) <= most:
                raise InputError(
                    f"{getattr(self, name):g} is out of range", where=name, hint=f"from {least:g} to {most:g}"
                )

    def of_answer(self, number: int) -> Sampling:
        """For one of several answers: drawn by itself, whatever the others are."""
        return self if self.seed is None else replace(self, seed=self.seed + number)

    @classmethod
    def asked(cls, **values: float | None) -> Sampling:
        """Of values that a user may have left out. Who narrows the choice wants one: the temperature is then 1."""
        given = {name: value for name, value in values.items() if value is not None}
        if given.keys() & {"top_k", "top_p", "min_p"}:
            given.setdefault("temperature", 1.0)
        return cls(**given)  # type: ignore[arg-type]


GREEDY = Sampling()
SAMPLING_NAMES = tuple(field.name for field in fields(Sampling))


class Sampler:
    """Chooses one answer's tokens."""

    def __init__(self, sampling: Sampling = GREEDY) -> None:
        self.sampling = sampling
        self._chance = np.random.default_rng(None if sampling.seed is None else sampling.seed % (1 << 64))

    def choose(self, logits: np.ndarray, seen: Sequence[int]) -> int:
        """A token's id. logits: float32 (vocabulary,), -inf where a token may not come; seen: ids of prompt and answer so far."""
        how = self.sampling
        if how.repetition_penalty != 1:
            logits = logits.copy()
            places = np.unique(np.asarray(seen, dtype=np.int64))
            values = logits[places]
            logits[places] = np.where(values > 0, values / how.repetition_penalty, values * how.repetition_penalty)
        if how.temperature == 0:
            return int(logits.argmax())
        places, shares = likely(logits, how)
        return int(places[np.searchsorted(np.cumsum(shares)[:-1], self._chance.random(), side="right")])


def likely(logits: np.ndarray, how: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Ids that may be chosen, likeliest first, and their shares, which sum to one. logits: (vocabulary,)."""
    count = min(how.top_k or len(logits), len(logits))
    # Sorting 260,000 logits takes longer than a small model's step: without top_k the far tail is cut off first.
    values = logits.astype(np.float64) / max(how.temperature, 1e-4)
    places = (
        np.argpartition(-values, count - 1)[:count]
        if count < len(values)
        else np.flatnonzero(values > values.max() - 40)
    )
    places = places[np.argsort(-values[places], kind="stable")]
    shares = np.exp(values[places] - values[places[0]])
    shares /= shares.sum()
    if how.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(shares), how.top_p)) + 1
        places, shares = places[:kept], shares[:kept]
    kept = int((shares >= how.min_p * shares[0]).sum())
    places, shares = places[:kept], shares[:kept]
    return places, shares / shares.sum()
