"""The whole path on a tiny model: the commands a user types, and every runtime that opens the bundle."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qft
from benchmarks.gpu.run import bundle_speed
from qft.bundle.constrained import Labels
from qft.bundle.golden import check_cases, from_manifest
from qft.bundle.manifest import Bundle
from qft.bundle.session import open_session
from qft.cli.options import made_job, open_job
from qft.console import print_summary
from qft.errors import StageError
from qft.files import sha256_file
from qft.measure.speed import measure_in_fresh_process
from qft.measure.threads import candidates
from qft.progress import silent
from qft.quant import ranges
from qft.runfolder import RunFolder
from qft.stages import bench, quantize
from qft.stages.carried import carried
from qft.stages.report import summarize
from qft.targets import find_target
from tests.e2e.conftest import Type, as_json, type_in
from tests.test_assignment import as_on_a_card

RUN = "runs/recipe"
INT4 = f"{RUN}/bundles/cpu-int4"


def test_two_lines_make_a_bundle(finished: Path) -> None:
    bundle = finished / INT4
    names = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert names == {
        "onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "config.json", "generation_config.json", "genai_config.json", "qft.json", "README.md",
    }  # fmt: skip
    manifest = json.loads((bundle / "qft.json").read_text())
    assert manifest["quality"]["rows"] == 24
    assert manifest["lineage"]["data"][0]["sha256"]
    stages = json.loads((finished / RUN / "run.json").read_text())["stages"]
    assert stages["merge"]["facts"]["evened_out"] == 6  # in each of two layers: for q, k, v; for gate and up; for down
    facts = stages["fold"]["facts"]["targets"]["cpu-int4"]
    layers = {t["name"]: (t["bits"], t["block"]) for t in manifest["quantization"] if ".layers." in t["name"]}
    finer = {name: grid for grid, names in facts["finer_layers"].items() for name in names}
    assert 0 < len(finer) < 14
    for name, (bits, block) in layers.items():
        grid = finer.get(name, "4 bits, blocks of 64")
        assert grid.startswith(f"{bits} bits"), name
        assert grid.endswith(f"blocks of {block}"), name
    assert len(manifest["quantization"]) == 15  # seven linear layers in each of two, and the embedding that is the head
    assert not [p for p in (finished / RUN).rglob("*") if p.name.endswith((".part", ".old"))]


def test_the_tuned_model_has_learnt_and_what_was_trained_is_what_ships(finished: Path, typed: Type) -> None:
    found = as_json(typed(finished, "qft run recipe.yaml --json"))
    steps = {step["stage"]: step for step in found["waterfall"]}
    assert list(steps) == ["base", "tuned", "merged", "exported", "rounded", "folded", "shipped"]
    assert steps["tuned"]["value"] >= steps["base"]["value"] + 30
    assert all(step["metric"] == "accuracy" for step in steps.values())
    assert abs(steps["shipped"]["loss"] - steps["folded"]["loss"]) < 0.05  # int8 activations lie between these
    assert steps["shipped"]["loss"] - steps["tuned"]["loss"] < 0.1
    assert found["survived_percent"] > 90
    assert steps["tuned"]["agreement"] is None
    for stage in ("merged", "exported", "rounded", "folded", "shipped"):
        assert steps[stage]["agreement"]["top1_percent"] > 90, stage
        assert -1e-6 < steps[stage]["agreement"]["kl"] < 0.1, stage
    for key in (
        "seconds",
        "peak_memory_bytes",
        "bundle_bytes",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    ):
        assert found[key] > 0, key


def test_run_again_skips_what_is_done(finished: Path, typed: Type) -> None:
    typed(finished, "qft run recipe.yaml")
    before = json.loads((finished / RUN / "run.json").read_text())["stages"]
    began = time.monotonic()
    done = typed(finished, "qft run recipe.yaml")
    assert done.returncode == 0
    assert time.monotonic() - began < 10
    assert done.stderr.count("done before") == 9
    after = json.loads((finished / RUN / "run.json").read_text())["stages"]
    assert {k: v for k, v in after.items() if k != "report"} == {k: v for k, v in before.items() if k != "report"}


def test_the_float_bundle_is_the_plain_export(finished: Path) -> None:
    import onnx

    folder = finished / RUN / "bundles/float"
    assert {p.name for p in (folder / "onnx").iterdir()} == {"model.onnx", "model.onnx_data"}
    model = onnx.load(folder / "onnx/model.onnx", load_external_data=False)
    assert not [node for node in model.graph.node if node.domain == "com.microsoft"]


@pytest.fixture(scope="module")
def by_genai(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same job, exported again by the other exporter."""
    pytest.importorskip("onnxruntime_genai")
    folder = tmp_path_factory.mktemp("by-genai") / "job"
    shutil.copytree(finished, folder)
    done = type_in(folder, "qft verify recipe.yaml export.exporter=genai")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done before") == 4  # prepare, tune, merge, fold
    return folder


EXPORTED = pytest.mark.parametrize("exported", ["finished", "by_genai"])


@EXPORTED
def test_it_opens_in_optimum_and_agrees_with_the_golden_cases(exported: str, request: pytest.FixtureRequest) -> None:
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    from qft.training.runner import TorchRunner

    bundle = Bundle.load(request.getfixturevalue(exported) / INT4)
    model = ORTModelForCausalLM.from_pretrained(
        bundle.folder, subfolder="onnx", file_name="model_q4.onnx", use_io_binding=False
    )

    class Runner(TorchRunner):
        def logits(self, rows: list, keep: int) -> np.ndarray:
            ids = torch.tensor(rows)
            positions = torch.arange(ids.shape[1])[None]
            return (
                model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions)
                .logits[:, -keep:]
                .numpy()
            )

        def generate(self, prompts: list, *, max_new_tokens: int, stop_ids: tuple) -> list:
            ids = torch.tensor(prompts)
            return model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)[:, ids.shape[1] :].tolist()

    cases = from_manifest(bundle.manifest)
    assert len(cases) == 24  # every held-out row: answers are so short that more would be taken
    agreement = check_cases(Runner(model, 2), cases, folder=bundle.folder, stop_ids=bundle.tokenizer.stop_ids)
    assert agreement.agrees, agreement
    assert model.generation_config.eos_token_id in (2, [2])


@EXPORTED
def test_it_opens_in_onnxruntime_genai_and_agrees_with_the_golden_cases(
    exported: str, request: pytest.FixtureRequest
) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    bundle = Bundle.load(request.getfixturevalue(exported) / INT4)
    model = genai.Model(str(bundle.folder))

    class Runner:
        def logits(self, rows: list, keep: int) -> np.ndarray:
            (row,) = rows
            found = []
            for end in range(len(row) - keep + 1, len(row) + 1):
                generator = self.generator(len(row) + 8)
                generator.append_tokens(np.array([row[:end]], dtype=np.int32))
                found.append(np.array(generator.get_logits()).reshape(-1))
            return np.stack(found)[None]

        def generate(self, prompts: list, *, max_new_tokens: int, stop_ids: tuple) -> list:
            (prompt,) = prompts
            generator = self.generator(len(prompt) + max_new_tokens)
            generator.append_tokens(np.array([prompt], dtype=np.int32))
            while not generator.is_done():
                generator.generate_next_token()
            answer = list(map(int, generator.get_sequence(0)))[len(prompt) :]
            return [
                answer if len(answer) == max_new_tokens else [*answer, stop_ids[0]]
            ]  # genai leaves the stop token out

        def generator(self, longest: int) -> object:
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(max_length=longest, do_sample=False)
            return genai.Generator(model, parameters)

    agreement = check_cases(
        Runner(), from_manifest(bundle.manifest), folder=bundle.folder, stop_ids=bundle.tokenizer.stop_ids
    )
    assert agreement.agrees, agreement


def test_another_exporter_changes_the_graph_and_not_what_it_says(finished: Path, by_genai: Path) -> None:
    found, other = (json.loads((folder / INT4 / "qft.json").read_text()) for folder in (by_genai, finished))
    for key in ("inputs", "outputs", "golden", "quantization"):
        assert len(found[key]) == len(other[key]), key
    assert {t["name"]: t["bits"] for t in found["quantization"]} == {
        t["name"]: t["bits"] for t in other["quantization"]
    }
    assert found["quality"]["value"] == pytest.approx(other["quality"]["value"])
    assert found["quality"]["loss"] == pytest.approx(
        other["quality"]["loss"], abs=1e-3
    )  # int8 activations, rounded anew
    for name in ("config.json", "generation_config.json", "genai_config.json", "tokenizer_config.json"):
        assert json.loads((by_genai / INT4 / name).read_text()) == json.loads((finished / INT4 / name).read_text()), (
            name
        )


def test_a_python_program_shows_how_far_a_run_is_unless_it_is_told(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    qft.run("recipe.yaml")
    assert re.search(r"prepare +done before", capfd.readouterr().err)
    qft.run("recipe.yaml", on_progress=silent)
    assert capfd.readouterr().err == ""


def test_a_run_ends_in_what_to_type_next(finished: Path, typed: Type) -> None:
    *_, last = typed(finished, "qft run recipe.yaml").stdout.splitlines()
    assert last == f"next     qft predict --bundle {INT4}   or: qft export --app web {INT4} page"


def test_predict_answers_with_a_label(finished: Path, typed: Type) -> None:
    found = as_json(typed(finished, "qft predict --json I-loved-every-minute"))
    assert found["answers"][0]["text"] in ("positive", "negative")
    lines = typed(
        finished, "qft predict", stdin="dull and slow at home\n\ngreat acting last night\n"
    ).stdout.splitlines()
    assert len(lines) == 2
    assert {line.split()[0] for line in lines} <= {"positive", "negative"}
    assert all(line.endswith("%") for line in lines)


def test_rows_of_a_file_are_answered_into_another(finished: Path, typed: Type) -> None:
    (finished / "new.csv").write_text('id,text\n7,"dull, and slow"\n8,great acting — 好\n', "utf-8")
    done = typed(finished, "qft predict --rows new.csv --out answers/new.jsonl")
    assert (done.returncode, done.stdout) == (0, "answers/new.jsonl: 2 rows\n"), done.stderr
    rows = [json.loads(line) for line in (finished / "answers/new.jsonl").read_text("utf-8").splitlines()]
    assert [(row["id"], row["text"]) for row in rows] == [("7", "dull, and slow"), ("8", "great acting — 好")]
    (same,) = as_json(typed(finished, "qft predict --json", stdin="dull, and slow"))["answers"]
    assert {"input": "dull, and slow", **rows[0]["predicted"]} == same
    for line, words in (
        ("qft predict --rows new.csv --out new.csv", "new.jsonl"),
        ("qft predict --rows new.csv --out answers/new.jsonl", "is there already"),
        ("qft predict --rows new.csv --out new.csv/new.jsonl", "cannot make new.csv"),
        ("qft predict --column text dull", "--rows"),
        ("qft predict --rows new.csv text", "not both"),
        ("qft predict --rows new.csv --column txt --out none.jsonl", "did you mean 'text'?"),
    ):
        done = typed(finished, line)
        assert done.returncode == 2
        assert words in done.stderr
    assert not (finished / "none.jsonl").exists()
    assert sorted(path.name for path in (finished / "answers").iterdir()) == ["new.jsonl"]


def test_lines_on_stdin_are_utf_8_with_or_without_a_mark(finished: Path) -> None:
    words = [sys.executable, "-m", "qft", "predict", "--json"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for stdin, code in (("\ufeffgreat acting — 好\n".encode(), 0), ("café\n".encode("latin-1"), 2)):
        done = subprocess.run(words, cwd=finished, env=environment, input=stdin, capture_output=True, check=False)
        assert done.returncode == code, done.stderr
        said = json.loads(done.stdout.decode("utf-8"))
        assert said["answers"][0]["input"] == "great acting — 好" if code == 0 else "not UTF-8" in said["error"][0]


def test_check_finds_a_changed_and_a_foreign_file(finished: Path, typed: Type) -> None:
    assert as_json(typed(finished, "qft check --json"))["agrees"]
    path = finished / INT4 / "generation_config.json"
    content = path.read_text()
    try:
        path.write_text(content + " ")
        (finished / INT4 / "extra.bin").write_text("x")
        done = typed(finished, "qft check")
        assert done.returncode == 1
        assert "generation_config.json: has changed" in done.stderr
        assert "extra.bin: is not part" in done.stderr
    finally:
        path.write_text(content)
        (finished / INT4 / "extra.bin").unlink(missing_ok=True)


def test_eval_measures_the_bundle_again_and_on_rows_of_your_own(finished: Path, typed: Type) -> None:
    manifest = json.loads((finished / INT4 / "qft.json").read_text())
    again = as_json(typed(finished, "qft eval --json"))
    assert again["quality"].pop("agreement") is None  # the tuned model is not in the bundle
    assert manifest["quality"].pop("agreement")["kl"] < 0.1
    assert again["quality"].pop("signatures") == manifest["quality"].pop("signatures") == []  # nothing was translated
    assert again["quality"] == pytest.approx(manifest["quality"])
    (finished / "own.jsonl").write_text(
        '{"text": "a fine film by the sea", "label": "positive"}\n{"text": "dull", "label": "negative"}\n'
    )
    assert as_json(typed(finished, "qft eval --json --rows own.jsonl"))["quality"]["rows"] == 2


def test_plan_marks_the_answer(finished: Path, typed: Type) -> None:
    found = as_json(typed(finished, "qft plan recipe.yaml --json"))
    assert len(found["rows"]) == 3
    for row in found["rows"]:
        marked = [run["text"] for run in row["runs"] if run["in_loss"]]
        assert marked in (["positive<|im_end|>"], ["negative<|im_end|>"])
    assert found["trial"] is None
    shown = typed(finished, "qft plan recipe.yaml --try").stdout
    assert "in the loss" in shown
    assert re.search(
        r"learning +about \d+\.\d minutes for \d+ steps, at [\d,]+ tokens/s here; \d+.*B at the peak", shown
    )


def test_every_bundle_has_a_model_card_that_the_hub_reads(finished: Path, tiny_model: Path) -> None:
    from huggingface_hub import ModelCard

    for target in ("float", "cpu-int4"):
        folder = finished / RUN / "bundles" / target
        manifest = json.loads((folder / "qft.json").read_text())
        assert manifest["files"]["README.md"] == sha256_file(folder / "README.md")
        card = ModelCard.load(folder / "README.md")
        assert (card.data.license, card.data.pipeline_tag, card.data.language) == ("other", "text-generation", ["en"])
        (result,) = card.data.eval_results
        assert result.metric_type == manifest["quality"]["metric"]
        assert result.metric_value == pytest.approx(manifest["quality"]["value"], abs=1e-3)
        assert str(tiny_model.parent) not in card.content  # where it lay is nobody's business
        assert f"`{tiny_model.name}`" in card.text


def test_a_licence_that_forbids_is_said_before_a_run(tiny_model: Path, tmp_path: Path, typed: Type) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    rows = [{"text": f"{word} at home {n}", "label": word} for word in ("good", "bad") for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "job.yaml").write_text("model: model\ndata: {train: rows.jsonl, prompt: '{text}'}\n")
    done = typed(tmp_path, "qft plan job.yaml")
    assert "model is under CC BY-NC: forbids commercial use" in done.stdout
    (warning,) = as_json(typed(tmp_path, "qft plan job.yaml --json"))["warnings"]
    assert "CC BY-NC" in warning


def test_the_report_needs_no_network_and_shows_every_stage(finished: Path, typed: Type) -> None:
    assert typed(finished, "qft report").returncode == 0
    text = (finished / RUN / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!#)|@import|url\((?!#)", text)
    for words in ("base", "tuned", "merged", "exported", "rounded", "folded", "shipped", "tokens/s", "reviews.jsonl"):
        assert words in text
    assert text.count("<svg") == 3


def test_which_words_carried_an_error_of_a_model_that_writes_labels(finished: Path, tmp_path: Path) -> None:
    """Answers are turned over that were right; the figures are those of asking the bundle as `qft predict` does."""
    run = RunFolder(tmp_path / "recipe")
    shutil.copytree(finished / RUN, run.root)
    other = {"positive": "negative", "negative": "positive"}
    kept = [json.loads(line) for line in run.answers("quantize-cpu-int4").read_text().splitlines()]
    for number, one in enumerate(kept):
        wrong = number < 4
        one |= {"right": not wrong, "loss": float(wrong * (number + 1))}
        one["answer"] = other[one["expected"]] if wrong else one["expected"]
    kept[4] |= {"right": False, "loss": 9.0, "answer": "neither"}  # no label: nothing was chosen
    run.answers("quantize-cpu-int4").write_text("".join(json.dumps(one) + "\n" for one in kept))
    found = carried(made_job(run), "cpu-int4")
    lines = {
        f"reviews.jsonl:{n}": line for n, line in enumerate((finished / "reviews.jsonl").read_text().splitlines(), 1)
    }
    texts = [json.loads(lines[one["where"]])["text"] for one in kept]
    assert ["".join(word.text for word in one.words) for one in found] == [texts[3], texts[2], texts[1]]
    bundle = Bundle.load(run.bundle("cpu-int4"))
    runner = bundle.runner()
    for one, row in zip(found, (3, 2, 1), strict=True):
        assert (one.answer, one.expected) == (kept[row]["answer"], kept[row]["expected"])
        words = [word.text for word in one.words]
        without = ["".join(words[:n] + words[n + 1 :]) for n in range(len(words))]
        labels = Labels([one.answer, one.expected], bundle.tokenizer)
        whole, *left = (c.probabilities[one.answer] for c in bundle.choose([texts[row], *without], runner, labels))
        assert one.probability == pytest.approx(whole, abs=1e-6)
        assert [word.fall for word in one.words] == pytest.approx([whole - each for each in left], abs=1e-6)
    assert any(abs(word.fall or 0) > 0.01 for one in found for word in one.words)


def test_a_report_on_other_rows_than_those_that_were_measured_is_refused(finished: Path, typed: Type) -> None:
    rows = (finished / "reviews.jsonl").read_text()
    edited = "".join(rows.splitlines(keepends=True)[20:])
    page = finished / RUN / "report.html"
    before = page.read_bytes() if page.exists() else None
    try:
        for text, held_out in ((rows, 30), (edited, 24)):  # more rows, and as many others
            (finished / "reviews.jsonl").write_text(text)
            assert typed(finished, f"qft plan recipe.yaml data.eval={held_out}").returncode == 0
            done = typed(finished, f"qft report {RUN}")
            assert done.returncode == 2
            assert f"{RUN}/data/eval.jsonl: other rows are held out by now than those that were measured" in done.stderr
            assert f"`qft run {RUN}` measures these" in done.stderr
            assert "Traceback" not in done.stderr
            assert (page.read_bytes() if page.exists() else None) == before
    finally:
        (finished / "reviews.jsonl").write_text(rows)
        typed(finished, "qft plan recipe.yaml")


def test_bench_again_with_other_threads_changes_only_the_bench(finished: Path, typed: Type) -> None:
    before = json.loads((finished / RUN / "run.json").read_text())["stages"]
    found = as_json(typed(finished, "qft bench --json bench.threads=1"))
    assert found["targets"]["cpu-int4"]["speed"]["threads"] == 1
    after = json.loads((finished / RUN / "run.json").read_text())["stages"]
    assert after["tune"] == before["tune"]


def test_threads_are_tried_shown_and_the_fastest_taken(finished: Path, typed: Type, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(finished, here)  # what is typed stays with a run, and other tests go on with theirs
    before = json.loads((here / RUN / "run.json").read_text())["stages"]["bench"]
    assert before["facts"]["threads_tried"] == {}
    shown = typed(here, "qft bench bench.threads=auto")
    facts = json.loads((here / RUN / "run.json").read_text())["stages"]["bench"]["facts"]
    for name, tried in facts["threads_tried"].items():
        assert [int(threads) for threads in tried] == candidates()
        assert tried[str(facts["targets"][name]["threads"])] == max(tried.values()) > 0
    assert set(facts["threads_tried"]) == {"cpu-int4", "float"}
    assert "cpu-int4: threads tried" in shown.stdout


def test_a_float16_target_names_large_activations_and_carries_its_providers_options(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model's outputs are small: what counts as large is set among them."""
    monkeypatch.chdir(finished)
    monkeypatch.setattr(ranges, "FLAGGED", 2.0)
    with open_job([], runs=Path("runs"), required=False, on_progress=lambda _: None) as job:
        facts = quantize.ship(job, find_target("coreml"))
        bundle = Bundle.load(job.run.bundle("coreml"))
    shutil.rmtree(bundle.folder)  # other tests count what this run ships
    assert facts.large_activations == bundle.manifest["large_activations"]
    assert facts.large_activations
    assert min(facts.large_activations.values()) > 2
    assert all(name.startswith(("model", "lm_head")) for name in facts.large_activations)
    assert bundle.provider_options("coreml") == {"ModelFormat": "MLProgram"}
    assert bundle.provider_options("cpu") == {}


def test_the_script_for_cards_measures_a_bundle_under_any_provider(finished: Path) -> None:
    found = bundle_speed(finished / INT4, "cpu")
    assert found["passed"]
    assert found["on_cpu"] == {}
    assert min(found["prefill_tokens_per_second"], found["decode_tokens_per_second"]) > 0


def test_bench_on_a_card_lists_what_was_left_to_the_processor_and_fails_beyond_a_twentieth(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card is this processor; only where its sessions say that nodes ran is made up."""

    def on_the_processor(folder: Path, work: Any, **keys: Any) -> Any:
        return measure_in_fresh_process(folder, work, **{**keys, "provider": "cpu", "trials": 1})

    monkeypatch.chdir(finished)
    monkeypatch.setattr(bench, "measure_in_fresh_process", on_the_processor)
    monkeypatch.setattr(bench, "open_session", lambda model, **keys: open_session(model, **{**keys, "provider": "cpu"}))
    typed = ["bench.provider=cuda"]
    with open_job(typed, runs=Path("runs"), required=False, on_progress=lambda _: None) as job:
        with pytest.raises(StageError, match="100% of the nodes fell back from CUDAExecutionProvider"):
            bench.run(job)
        monkeypatch.setattr(bench, "assigned", as_on_a_card("GatherBlockQuantized"))
        found = bench.run(job)
        assert found.on_cpu == {"cpu-int4": {"GatherBlockQuantized": 1}}  # made for another provider: looked at as well
        shipped = summarize(job)
    seen = replace(shipped, sizes={n: replace(s, on_cpu=found.on_cpu.get(n, {})) for n, s in shipped.sizes.items()})
    print_summary(seen)
    assert "cpu-int4: left to the processor were 1 GatherBlockQuantized" in capsys.readouterr().out


def test_a_provider_that_is_absent_is_an_error(finished: Path, typed: Type) -> None:
    done = typed(finished, "qft bench --provider cuda")
    assert done.returncode == 2
    assert "no cuda provider" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_promise_that_is_not_kept_fails_with_its_numbers_and_still_reports(finished: Path, typed: Type) -> None:
    done = typed(finished, "qft run recipe.yaml verify.quantized_top1=1.0 verify.quantized_kl=1e-9")
    assert done.returncode == 1
    assert "verify.quantized_kl" in done.stderr
    assert "at most 1e-09" in done.stderr
    assert "at most 1e-09" in (finished / RUN / "report.html").read_text()
    assert json.loads((finished / RUN / "run.json").read_text())["stages"]["verify"]["state"] == "failed"
    assert typed(finished, "qft run recipe.yaml").returncode == 0


def test_the_file_holds_the_codes_scales_and_zero_points_that_folding_left(finished: Path) -> None:
    import onnx_ir as ir
    from torch import equal

    from qft.quant.grids import unpack
    from qft.quant.store import load_matrices

    stored = ir.load(finished / INT4 / "onnx/model_q4.onnx").graph.initializers
    matrices = load_matrices(finished / RUN / "fold/cpu-int4/matrices.safetensors")
    assert len(matrices) == 14
    for name, matrix in matrices.items():
        scheme, parts = matrix.scheme, ("q", "scales") if matrix.scheme.symmetric else ("q", "scales", "zero_points")
        codes, scales, *zeros = (rows_of(stored, matrices, name, part) for part in parts)
        assert equal(unpack(codes, scheme.bits, scheme.block), matrix.codes)
        assert equal(scales, matrix.scales)
        if zeros:
            assert equal(unpack(zeros[0], scheme.bits, scales.shape[1]), matrix.zero_points)


def rows_of(stored: Any, matrices: Any, layer: str, part: str) -> Any:
    """A layer's rows of an initializer: products of one input are merged, `q_proj_q+k_proj_q+v_proj_q`."""
    import torch

    (merged,) = (name for name in stored if f"{layer}_{part}" in name.split("+"))
    layers = [name.removesuffix(f"_{part}") for name in merged.split("+")]
    rows = torch.from_numpy(stored[merged].const_value.numpy().copy())
    return dict(zip(layers, rows.split([len(matrices[name].codes) for name in layers]), strict=True))[layer]


def test_without_a_grid_weights_are_rounded_to_nearest(finished: Path, typed: Type) -> None:
    found = as_json(
        typed(finished, "qft quantize recipe.yaml name=nearest quantization.grid=none training.epochs=1 --json")
    )
    assert [step["stage"] for step in found["waterfall"]] == ["tuned", "merged", "exported", "shipped"]
    assert not (finished / "runs/nearest/fold").exists()


def test_both_ways_of_merging_are_measured(finished: Path, typed: Type) -> None:
    found = as_json(typed(finished, "qft merge recipe.yaml name=plain training.epochs=1 --json"))
    losses = found["merge"]["validation_losses"]
    assert set(losses) == {"16-bit base", "dequantized 4-bit base"}
    if found["merge"]["way"] == "16-bit base":  # only if it is better beyond chance: see test_merge
        assert losses["16-bit base"] < losses["dequantized 4-bit base"]
    config = json.loads((finished / "runs/plain/merged/config.json").read_text())
    assert config["tie_word_embeddings"]
    from safetensors import safe_open

    with safe_open(finished / "runs/plain/merged/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a dict
