"""What benchmarks rely on without saying so."""

from __future__ import annotations

import json

from benchmarks.cells import fold_words
from benchmarks.quantization import QUICK, gap


def test_a_folded_cell_is_found_again_in_the_cache() -> None:
    words = fold_words(QUICK)
    assert json.loads(json.dumps(words)) == words


def test_a_gap_is_of_perplexity_and_its_interval_is_paired() -> None:
    nats, tokens = [float(n) for n in range(300, 500)], [100] * 200
    found = gap(nats, [n + 2.0 for n in nats], tokens)  # two hundredths of a nat a token, on every row alike
    assert abs(found.percent - 2.02) < 0.01
    assert abs(found.high - found.low) < 1e-6
