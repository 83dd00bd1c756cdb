"""What benchmarks rely on without saying so."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import encoders, export_time, runtime, speech
from benchmarks.augmentation import gained
from benchmarks.cells import fold_words
from benchmarks.gpu import peers
from benchmarks.gpu import run as gpu
from benchmarks.gpu.model import Setting
from benchmarks.moved import off_grid
from benchmarks.quantization import QUICK, SETS, _with_rate, gap, is_current, points, promised, table
from benchmarks.rounding_rows import MOVED
from benchmarks.tasks import Result, baseline, gain, row


def test_a_folded_cell_is_found_again_in_the_cache() -> None:
    words = fold_words(QUICK)
    assert json.loads(json.dumps(words)) == words


def test_a_gap_is_of_perplexity_and_its_interval_is_paired() -> None:
    nats, tokens = [float(n) for n in range(300, 500)], [100] * 200
    found = gap(nats, [n + 2.0 for n in nats], tokens)  # two hundredths of a nat a token, on every row alike
    assert abs(found.value - 2.02) < 0.01
    assert abs(found.high - found.low) < 1e-6


def cell_record(
    name: str, seed: int, nats: float, *, of: str = "tinyshakespeare", right: bool | None = None
) -> dict[str, Any]:
    setting = replace(SETS[of], seed=seed, learning_rates=(2e-3,))
    found: dict[str, Any] = {
        "cell": name, "set": of, "seed": seed, "setting": json.loads(json.dumps(asdict(setting))), "row_nats": [nats] * 9,
        "row_tokens": [10] * 9, "learning_rate": 2e-3,
    }  # fmt: skip
    if right is not None:
        found["row_right"] = [right] * 9
    if name != "base":
        found |= {"train_seconds": 100.0, "total_seconds": 150.0 if "fold" in name else 100.0}
    if "fold" in name:
        found |= {"fold": fold_words(setting), "bits_per_weight_linear": 5.0, "bits_per_weight_all": 5.5}
    return found


CELL_NATS = {
    "base": 40.0,
    "lora-none": 20.0,
    "lora-nf4": 21.0,
    "nearest-nf4": 24.0,
    "fold-none": 20.2,
    "fold-nf4": 21.1,
}
TITLES = {"a": "lora-none", "16-bit LoRA, folded": "fold-none", "NF4 QLoRA, folded": "fold-nf4"}


def test_a_line_of_the_table_is_over_seeds_and_its_gap_to_its_own_fine_tune() -> None:
    kept = [cell_record(name, seed, nats + seed) for seed in (0, 1) for name, nats in CELL_NATS.items()]
    lines = {line["row"]: line for line in table(kept, TITLES)}
    assert lines["a"]["perplexity"] == pytest.approx(math.exp(2.05))
    assert lines["16-bit LoRA, folded"]["gap"]["value"] == pytest.approx(100 * (math.exp(0.02) - 1))
    assert lines["NF4 QLoRA, folded"]["gap"]["value"] == pytest.approx(100 * (math.exp(0.01) - 1))
    assert lines["NF4 QLoRA, folded"]["time_ratio"] == 1.5
    busy = [record | {"busy": True, "total_seconds": 99.0} if record["seed"] else record for record in kept]
    assert {line["row"]: line for line in table(busy, TITLES)}["NF4 QLoRA, folded"]["time_ratio"] == 1.5
    assert "gap" not in lines["untouched base, float"]


def test_intents_count_by_points_and_texts_by_gaps() -> None:
    texts = [cell_record(name, 0, nats) for name, nats in CELL_NATS.items()]
    intents = [
        cell_record(name, 0, nats, of="clinc_oos", right=name != "fold-none") for name, nats in CELL_NATS.items()
    ]
    found = promised([*table(texts + intents, TITLES)])
    assert found["gap_percent"] == pytest.approx(100 * (math.exp(0.02) - 1))
    assert (found["points"], found["points_nf4"]) == (-100, 0)
    assert points([True, False] * 50, [True, True] * 50).low > 30


def test_a_record_of_another_setting_or_folding_is_made_again() -> None:
    kept = cell_record("fold-none", 1, 20.0)
    assert is_current(kept, SETS["tinyshakespeare"])
    assert not is_current(kept, SETS["gsm8k"])
    assert not is_current(kept, replace(SETS["tinyshakespeare"], steps=301))
    assert not is_current({**kept, "fold": {**kept["fold"], "folding": 0}}, SETS["tinyshakespeare"])


def test_a_weight_between_two_points_of_the_old_grid_is_off_it_by_a_share_of_a_step() -> None:
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::32], codes[:, 1::32] = 0, 15  # as GGUF chooses steps, a block holds its least and its largest code
    old = {"a": codes * 0.25 - 2}
    assert off_grid(old, old) < 1e-6
    assert off_grid(old, {"a": old["a"] + 0.25 * 7.3}) == pytest.approx(0.3, rel=1e-4)


def test_a_moved_base_stands_for_itself() -> None:
    kept = [{**cell_record(name, 0, nats + 0.5 * ("fold" in name)), "set": MOVED} for name, nats in CELL_NATS.items()]
    both = promised([*table([cell_record(name, 0, nats) for name, nats in CELL_NATS.items()] + kept, TITLES)])
    assert both["gap_percent"] == pytest.approx(100 * (math.exp(0.02) - 1))
    assert both["gap_percent_moved_base"] == pytest.approx(100 * (math.exp(0.07) - 1))
    assert "gap_percent" not in promised([*table(kept, TITLES)])


def test_later_seeds_take_the_rate_that_was_best_for_the_first() -> None:
    first, later = SETS["tinyshakespeare"], replace(SETS["tinyshakespeare"], seed=1)
    kept = [cell_record("lora-none", 0, 20.0)]
    assert _with_rate(first, kept).learning_rates == first.learning_rates
    assert _with_rate(later, kept).learning_rates == (2e-3,)


def answered(expected: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"expected": expected, "answer": answer, "right": answer == expected, "loss": 2.0, "targets": 3, **more}


def test_a_gain_is_in_the_metrics_unit_and_good_direction() -> None:
    before = [answered("a", "a" if n % 4 == 0 else "b") for n in range(200)]
    after = [answered("a", "a" if n % 2 == 0 else "b", loss=2.0 + math.log(0.8)) for n in range(200)]
    points = gain("accuracy", before, after)
    assert points["value"] == 25
    assert points["low"] < 25 < points["high"]
    less = gain("perplexity", before, after)  # it falls to four fifths, on every row alike
    assert less == {name: pytest.approx(0.2 * math.exp(2)) for name in ("value", "low", "high")}
    said = [answered("a fine day", "a fine"), answered("well made", "well made")] * 20
    worse = gain("wer", [answered(each["expected"], each["expected"]) for each in said], said)
    assert worse["value"] == pytest.approx(-20)
    assert worse["low"] < -20 < worse["high"] < 0
    nearer = gain("chrf", said, [answered(each["expected"], each["expected"]) for each in said])
    assert nearer["low"] <= nearer["value"] <= nearer["high"] <= 100
    assert nearer["low"] > 0


def test_the_commonest_answer_is_judged_by_the_metric_of_its_recipe() -> None:
    answers = [answered("good", "bad")] * 30 + [answered("bad", "bad")] * 10
    assert baseline("accuracy", answers) == 75
    assert baseline("macro_f1", answers, ["good", "bad"]) == pytest.approx(100 * (2 * 30 / (30 + 40)) / 2)


def test_a_recipe_of_several_targets_is_told_by_its_first() -> None:
    def step(stage: str, value: float, **target: str) -> dict[str, Any]:
        return {"stage": stage, "metric": "accuracy", "value": value, **target}

    steps = [step("base", 10), step("tuned", 80), step("exported", 80)]
    steps += [step("shipped", 79, target="cpu-int8"), step("shipped", 70, target="web-int4")]
    summary = {"bundle": "runs/x/bundles/cpu-int8", "waterfall": steps, "labels": None, "majority_percent": None}
    summary |= {"seconds": 60, "peak_memory_bytes": 1, "energy": {"joules": 1}, "bundle_bytes": 5, "problems": []}
    answers = [answered("a", "a")] * 4
    found = row("x", {"summary": summary, "before": answers, "shipped": answers})
    assert (found["target"], found["shipped"], found["bundle_bytes"]) == ("cpu-int8", 79, 5)
    assert found["targets"] == {"cpu-int8": 79, "web-int4": 70}
    assert found["baseline"] is None


def test_a_recipe_that_is_run_again_takes_its_own_place_among_the_results(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    lines = {name: {"recipe": name, "shipped": 1.0} for name in ("b", "a")}
    Result(quick=False, table=lines, rows={"a": {}, "b": {}}).write(path)
    again = Result.load(path, quick=False)
    again.table["b"] = {"recipe": "b", "shipped": 2.0}
    again.write(path)
    assert [(line["recipe"], line["shipped"]) for line in json.loads(path.read_text())["result"]["recipes"]] == [
        ("a", 1.0),
        ("b", 2.0),
    ]
    assert Result.load(path, quick=True).table == {}


def test_what_changed_rows_gain_is_a_mean_over_seeds() -> None:
    plain = [[{"right": n % 2 == 0} for n in range(100)], [{"right": False} for _ in range(100)]]
    changed = [[{"right": True} for _ in range(100)], [{"right": n < 50} for n in range(100)]]
    found = gained(plain, changed)
    assert found["value"] == pytest.approx((50 + 50) / 2)
    assert found["low"] < 50 < found["high"]
    assert gained(plain, plain) == {"value": 0, "low": 0, "high": 0}


def runtime_trial(way: str, seconds: float, *, rows: int = 1, joules: float | None = None) -> dict[str, Any]:
    spent = {name: [seconds, 9.0, seconds] for name in ("prefill", "prefill_processor", "decode", "decode_processor")}
    run = {"prompt_tokens": 256, "rows": rows, "repeats": 2, "seconds": spent, "peak_memory_bytes": 1, "joules": joules}
    return {"way": way, "runs": [run], "load_seconds": 1.0, "perplexity": 8.0}


WAYS_SECONDS = {"qft": 0.5, "ORTModel, qft's bundle": 0.25, "raw session, genai's graph": 2.0, "torch": 1.0}


def test_runtime_is_compared_with_peers_and_not_with_other_runtimes_on_our_bundle() -> None:
    trials = [runtime_trial(way, seconds, rows=rows) for way, seconds in WAYS_SECONDS.items() for rows in (1, 8)]
    table = runtime.table_of([*trials, {"way": "llama.cpp, Q4_1", "failed": "-4"}])
    assert [(row["way"], row["rows"]) for row in table[:4]] == [(way, 1) for way in WAYS_SECONDS]
    assert (table[0]["prefill"], table[0]["decode"], table[0]["first_token_seconds"]) == (512, 2, 0.5)
    assert (table[4]["prefill"], table[4]["decode"], table[4]["first_token_seconds"]) == (4096, 16, 0.5)
    cells = runtime.ratios(table, weight_bytes=100, bandwidth=1000.0)
    assert set(cells) == {"256 tokens x 1", "256 tokens x 8"}
    for cell in cells.values():
        assert cell["decode_vs_best_peer"] == 2
        assert cell["decode_vs_raw_session"] == 4
        assert cell["share_of_bandwidth"] == 0.2  # rows that go together read the weights once


def test_runtimes_result_has_the_five_names_of_the_issue() -> None:
    cells = {
        "256 tokens x 1": {"decode_vs_best_peer": 1.5, "prefill_vs_best_peer": 1.2, "share_of_bandwidth": 0.5},
        "2048 tokens x 1": {"decode_vs_best_peer": 9.0, "prefill_vs_best_peer": 9.0, "share_of_bandwidth": 9.0},
    }
    encoders_said = {"int8, 1 text": 1.0, "int8, 32": 1.0, "float32, 1 text": 0.5, "float32, 32": 8.0, "table": [{}]}
    encoders_said |= {"int8_processor, 1 text": 99.0}
    speech_said = {"qft, cpu-int8, 10 s, times_real": 2.0, "qft, cpu-int8, 30 s, times_real": 0.98}
    found = runtime.result(cells, {"encoders": {"result": encoders_said}, "speech": {"result": speech_said}})
    assert found == {
        "decode_vs_best_peer": 1.5,
        "prefill_vs_best_peer": 1.2,
        "share_of_bandwidth": 0.5,
        "encoder_vs_peer": pytest.approx(2.0),
        "whisper_vs_peer": 0.98,
    }


def test_results_that_runtime_takes_from_other_benchmarks_are_as_they_write_them() -> None:
    results = Path(runtime.__file__).parent / "results"
    read = {name: json.loads((results / f"{name}.json").read_text("utf-8")) for name in ("encoders", "speech")}
    assert runtime.encoder_ratio(read["encoders"]) > 0
    assert runtime.whisper_ratio(read["speech"]) > 0


def test_energy_is_of_one_repeat_and_missing_where_nothing_counts_it() -> None:
    counted, unread = runtime_trial("qft", 1.0, joules=30.0), runtime_trial("torch", 1.0)
    table = runtime.table_of([counted, counted, unread])
    assert [row["joules"] for row in table] == [15.0, None]
    first, second = runtime.as_markdown(table).splitlines()[2:]
    assert "15 J" in first
    assert " J " not in second


def test_long_prompts_are_read_in_fewer_rounds_and_a_quick_run_ends_in_time() -> None:
    def read(number: int, *, quick: bool) -> set[int]:
        return {cell.prompt_tokens * cell.rows for cell in runtime.cells_of(number, quick=quick)}

    assert read(0, quick=False) == {16, 256, 2048, 128, 16384}
    assert read(2, quick=False) == read(0, quick=True) == {16, 256, 2048, 128}
    assert read(1, quick=False) == read(1, quick=True) == {16, 256, 128}
    assert runtime.goes_on(0, 0, 0, quick=True)
    assert runtime.goes_on(1, 400, 400, quick=True)
    assert not runtime.goes_on(1, 800, 800, quick=True)
    assert runtime.goes_on(1, 8000, 8000, quick=False)
    assert not runtime.goes_on(7, 8000, 8000, quick=False)


def test_an_operators_time_is_its_sum_over_a_run_and_the_median_over_runs() -> None:
    events: list[dict[str, Any]] = []
    for number, microseconds in enumerate((100, 300, 200)):
        begun = 1000 * number
        events.append({"name": "model_run", "cat": "Session", "ts": begun, "dur": 900})
        for at in (1, 500):
            kernel = {"name": "a_kernel_time", "cat": "Node", "ts": begun + at, "dur": microseconds}
            events.append({**kernel, "args": {"op_name": "MatMulNBits"}})
    assert runtime.by_operator(events) == {"MatMulNBits": 0.4, "whole run": 0.9}


def test_an_export_is_held_against_the_fastest_and_against_the_leanest_peer() -> None:
    spent = {export_time.OURS: (8.0, 600), "optimum-cli: float32": (16.0, 1200), "genai's builder: int4": (10.0, 2400)}
    trials = [
        {"way": way, "seconds": seconds * factor, "peak_memory_bytes": peak, "written_bytes": 1}
        for way, (seconds, peak) in spent.items()
        for factor in (1, 1, 3)
    ]
    found = export_time.result([export_time.line(way, trials, weights=400) for way in spent])
    assert found == {
        "export_seconds": 8,
        "export_times_weights": 1.5,
        "export_seconds_vs_best_peer": 0.8,
        "export_peak_memory_bytes_vs_best_peer": 0.5,
    }


def test_an_encoder_is_compared_with_the_faster_of_optimums_graphs() -> None:
    def trial(way: str, seconds: float) -> dict[str, Any]:
        run = {
            "batches": "1 text",
            "tokens": 10,
            "filled_up": 15,
            "seconds": [seconds, 3 * seconds],
            "processor_seconds": [1.0, 1.0],
        }
        same = {"cosines": [1.0, 0.5], "same_nearest": [True, False]}
        return {"way": way, "runs": [run], "load_seconds": 1.0, "peak_memory_bytes": 1, **same}

    spent = {"qft, cpu-int8": 0.5, "qft, cpu-float32": 1.0, "optimum O3": 2.0, "optimum's export": 3.0}
    table = [encoders.line(way, "1 text", [trial(way, seconds)]) for way, seconds in spent.items()]
    assert table[0]["milliseconds"] == 1000
    assert table[0]["filled_up"] == 1.5
    assert (table[0]["least_cosine"], table[0]["same_nearest_percent"]) == (0.5, 50)
    found = encoders.result(table)
    assert found == {
        "int8, 1 text": 4,
        "float32, 1 text": 2,
        "int8_processor, 1 text": 1,
        "float32_processor, 1 text": 1,
    }


def test_vectors_are_as_alike_as_their_directions() -> None:
    plain = [[1.0, 0.0], [0.9, 0.1], [0.0, 2.0]]
    assert encoders.alike(plain, plain) == {"cosines": pytest.approx([1, 1, 1]), "same_nearest": [True] * 3}
    found = encoders.alike([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], plain)
    assert found["cosines"] == pytest.approx([1, 0.1 / math.hypot(0.9, 0.1), 1])
    assert found["same_nearest"] == [True, False, True]  # of the second text it is the third now


def test_speech_is_measured_in_how_many_times_real_time_it_is() -> None:
    def trial(seconds: float, texts: list[str]) -> dict[str, Any]:
        run = [{"seconds": seconds, "processor_seconds": 2 * seconds, "text": text} for text in texts]
        return {"runs": [run, run], "load_seconds": 1.0, "peak_memory_bytes": 1}

    said = ["we saw old houses", "here"]
    spent = {**dict.fromkeys(speech.WAYS, 2.0), next(iter(speech.OURS)): 0.5}
    table = [
        speech.line(way, [trial(seconds, ["We saw houses", "Here."])], 20.0, said) for way, seconds in spent.items()
    ]
    assert table[0]["times_real"] == 20
    assert table[0]["word_error_percent"] == 20  # one of five words is missing
    found = speech.result(table)
    assert set(found.values()) == {1, 4}


def test_the_script_for_cards_runs_dry() -> None:
    """Every part, on a tiny model on this processor: what it would do on a card, but for the card."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        ["bash", "benchmarks/gpu/run.sh", "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHON": sys.executable},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout)["parts"]
    assert set(parts) == {
        "nf4_gradients", "paged_optimizer", "loss_kernel", "attention_kernel", "decode", "training", "training_1b", "trl", "trl_1b",
        "unsloth", "unsloth_1b",
    }  # fmt: skip
    assert all(part["passed"] for part in parts.values())
    assert parts["training"]["qft"]["tokens_per_second"] > 0
    assert parts["loss_kernel"]["float32"]["loss_error"] < 1e-4


def test_a_part_on_a_card_has_a_process_of_its_own_and_no_more_than_what_is_left_of_ten_minutes() -> None:
    words = ["--device", "cpu", "--part", "loss_kernel"]
    found = gpu.one(words, until=time.monotonic() + 300)
    assert found["passed"]
    assert found["seconds"] > 0
    assert gpu.one(words, until=time.monotonic() + 0.2) == {"passed": False, "error": "took more than 0.2 s"}
    assert gpu.one(words, until=time.monotonic() + 300, part_seconds=0.1)["error"] == "took more than 0.1 s"
    assert "not begun" in gpu.one(words, until=time.monotonic() - 1)["error"]
    peer = gpu.one(["--device", "cpu", "--part", "trl_1b"], until=time.monotonic() - 1)
    assert peer["passed"]
    assert "not begun" in peer["not_measured"]
    assert "no_such_part" in gpu.one(["--part", "no_such_part"], until=time.monotonic() + 300)["error"]


def test_the_bundle_that_a_card_is_asked_for_is_the_newest_made_for_one(tmp_path: Path) -> None:
    assert gpu.newest_bundle(tmp_path) is None
    for age, name in ((3, "a/bundles/cuda-int4"), (1, "b/bundles/cuda-fp16"), (0, "b/bundles/cpu-int4")):
        (tmp_path / name).mkdir(parents=True)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert gpu.newest_bundle(tmp_path) == tmp_path / "b/bundles/cuda-fp16"


def test_what_a_peer_cannot_do_is_reported_and_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available for this card")

    monkeypatch.setattr(peers, "load", load)
    found = peers.trl(Setting.of("cpu"))
    assert found == {"passed": True, "not_measured": "RuntimeError: no kernel image is available for this card"}


def test_a_card_keeps_one_row_and_leaves_other_cards_theirs(tmp_path: Path) -> None:
    def figures(card: str, speed: float) -> dict[str, Any]:
        parts = {"training": {"passed": True, "qft": {"tokens_per_second": speed, "peak_bytes": 2e9}},
                 "trl_1b": {"passed": True, "tokens_per_second": 1234.0}, "loss_kernel": {"passed": False}}  # fmt: skip
        return {"device": f"{card} (cuda, compute capability 8.9), 7.1 of 8.0 GB free", "torch": "2.11", "parts": parts}

    laptop, desktop = "NVIDIA GeForce RTX 4060 Laptop GPU", "NVIDIA GeForce RTX 4060"
    path = gpu.keep(figures(laptop, 1111), tmp_path)
    gpu.keep(figures(desktop, 2222), tmp_path)  # its name begins as the laptop's does
    assert gpu.keep(figures(laptop, 3333), tmp_path) == path == tmp_path / "nvidia-geforce-rtx-4060-laptop-gpu.json"
    assert json.loads(path.read_text())["parts"]["training"]["qft"]["tokens_per_second"] == 3333
    _, _, head, _, *rows = (tmp_path / "README.md").read_text().splitlines()
    assert [line.count("|") for line in rows] == [head.count("|")] * 2
    assert [("2,222" in line, "3,333" in line) for line in rows] == [(True, False), (False, True)]
    assert "–, 1,234" in rows[0]
    assert rows[0].endswith("| 2.00 GB, – | –, – | –, – | –, – | 2 of 3 |")


def test_the_wheels_to_bring_are_named_with_their_sizes_and_hold_all_that_the_script_asks_for() -> None:
    lines = (Path(__file__).parent.parent / "benchmarks/gpu/wheels.txt").read_text().splitlines()
    sizes = {words[0].partition("==")[0]: float(words[2]) for line in lines if (words := line.split())[0] != "#"}
    assert max(sizes.values()) < 60
    assert {"torch", "transformers", *sizes} >= set(gpu.NEEDED)
    (command,) = [line for line in lines if "pip download" in line]
    # bitsandbytes, pydantic-core, psutil and pyarrow each have another tag.
    assert {"manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64"} <= set(command.split())
