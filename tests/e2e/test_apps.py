"""The apps of export/apps/, each with a bundle of every task it does: they compute what was measured, and answer as qft does."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qft.bundle.apps import APPS
from qft.bundle.manifest import Bundle
from qft.paths import shipped
from tests.conftest import BAD, GOOD, PLACES
from tests.e2e.browser import chromium, npm_packages, puppeteer
from tests.e2e.conftest import Type, type_in
from tests.e2e.test_classifier import classified  # noqa: F401
from tests.e2e.test_question_answering import reading  # noqa: F401
from tests.e2e.test_search import TEXTS, searched, vectors_of  # noqa: F401
from tests.e2e.test_speech import spoken  # noqa: F401
from tests.e2e.test_translation import translated  # noqa: F401

pytestmark = pytest.mark.apps
INT4 = "runs/recipe/bundles/cpu-int4"
JOBS = {
    "text-generation": ("finished", [f"{text} at home" for text in (*GOOD[:2], *BAD[:2])]),
    "text-classification": ("classified", [f"{text} in town" for text in (*GOOD[:2], *BAD[:2])]),
    "question-answering": (
        "reading",
        [
            {"question": "where", "context": "dull and slow. a fine film last night"},
            {"question": "I loved acting", "context": " and ".join([*GOOD[:4], f"{BAD[0]} {PLACES[0]}", *GOOD[4:]])},
        ],
    ),
    "automatic-speech-recognition": ("spoken", ["bundle/golden/0.wav", "bundle/golden/1.wav"]),
    "translation": ("translated", ["one two three", "six"]),
    "sentence-similarity": ("searched", [{"text": "dull", "among": [*GOOD[:2], *BAD[:3]]}]),
}


@pytest.fixture(params=JOBS)
def asked(request: pytest.FixtureRequest) -> tuple[Path, list[Any]]:
    """A bundle of each task, and what it is asked."""
    fixture, questions = JOBS[request.param]
    return request.getfixturevalue(fixture) / INT4, questions


def exported(app: str, bundle: Path, out: Path) -> Path:
    done = type_in(out.parent, f"qft export --app {app} {bundle} {out.name}")
    assert done.returncode == 0, done.stderr
    return out


def predicted(bundle: Path, questions: list[Any], app: Path) -> list[dict[str, Any]]:
    """`qft predict`'s answers."""
    if isinstance(questions[0], dict) and "among" in questions[0]:
        return [found_among(bundle, question, app) for question in questions]
    lines = [json.dumps(q) if isinstance(q, dict) else q for q in questions]
    done = type_in(app, f"qft predict --json --bundle {bundle}", stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["answers"]


def found_among(bundle: Path, question: dict[str, Any], app: Path) -> dict[str, Any]:
    """`qft predict`'s nearest texts with their cosines."""
    (app / "among.txt").write_text("\n".join(question["among"]))
    done = type_in(app, f"qft predict --json --bundle {bundle} --among among.txt", stdin=question["text"])
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)["answers"]
    return {"near": dict(zip(answer["texts"], answer["cosines"], strict=True))}


def answers_of(bundle: Path, questions: list[Any], app: Path) -> list[str]:
    """Their texts alone."""
    return [answer["text"] for answer in predicted(bundle, questions, app)]


def run(folder: Path, *words: str, timeout: float = 300) -> str:
    environment = {**os.environ, "PYTHONPATH": ""}  # qft is not to be found
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def alike(said: str, answer: dict[str, Any]) -> bool:
    """Whether an app says what qft does: the text, after which the app may say how likely it is; or texts with their cosines."""
    if "near" in answer:
        lines = [line.split("  ", 1) for line in said.splitlines()]
        near = {text: float(cosine) for cosine, text in lines}
        falling = sorted(near.values(), reverse=True) == list(near.values())
        return falling and near == pytest.approx(answer["near"], abs=0.011)  # two decimals, and kernels that differ
    return re.sub(r"\s*\d+ ?%(,?\s+unsure)?$", "", said.rstrip("\n")).removesuffix("(none)") == answer["text"]


def installed(app: Path) -> Path:
    """As after `npm install --ignore-scripts`."""
    (app / "node_modules").symlink_to(npm_packages((app / "package.json").read_text()))
    return app


def words_of(question: Any) -> list[str]:
    """A question as it is typed after a program's name."""
    if not isinstance(question, dict):
        return [question]
    return [word for words in question.values() for word in (words if isinstance(words, list) else [words])]


def test_python_app_computes_what_was_measured_and_answers_as_qft_does(
    asked: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    bundle, questions = asked
    app = exported("python", bundle, tmp_path / "app")
    found = json.loads(run(app, sys.executable, "answer.py", "--check"))
    assert found["agrees"], found
    for question, answer in zip(questions, predicted(bundle, questions, app), strict=True):
        said = run(app, sys.executable, "answer.py", *words_of(question))
        assert alike(said, answer), (said, answer)


def test_python_app_needs_onnxruntime_tokenizers_and_numpy_alone(finished: Path, tmp_path: Path) -> None:
    app = exported("python", finished / INT4, tmp_path / "app")
    code = "import sys; sys.argv = ['answer.py']; import answer; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in run(app, sys.executable, "-c", code).split()}
    assert {"onnxruntime", "tokenizers", "numpy"} <= loaded
    assert not {"qft", "torch", "transformers", "jinja2"} & loaded


def test_node_app_computes_what_was_measured_and_answers_as_qft_does(
    asked: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    bundle, questions = asked
    app = installed(exported("node", bundle, tmp_path / "app"))
    found = json.loads(run(app, "node", "answer.mjs", "--check"))
    assert found["agrees"], found
    for question, answer in zip(questions, predicted(bundle, questions, app), strict=True):
        said = run(app, "node", "answer.mjs", *words_of(question))
        assert alike(said, answer), (said, answer)


def test_node_pipeline_of_transformers_js_writes_what_qft_does_without_being_told_how(
    finished: Path, tmp_path: Path
) -> None:
    """The folder as it is: dtype, external data and special tokens are in its configs."""
    app = installed(exported("node", finished / INT4, tmp_path / "app"))
    text = "a fine film at home"
    (app / "pipeline.mjs").write_text(
        'import { env, pipeline } from "@huggingface/transformers";\n'
        'env.allowRemoteModels = false; env.localModelPath = "./";\n'
        'const write = await pipeline("text-generation", "bundle");\n'
        f'const messages = [{{ role: "system", content: "Judge." }}, {{ role: "user", content: {json.dumps(text)} }}];\n'
        "const [{ generated_text }] = await write(messages, { max_new_tokens: 8, do_sample: false });\n"
        "console.log(generated_text.at(-1).content);\n"
    )
    assert run(app, "node", "pipeline.mjs").splitlines() == answers_of(finished / INT4, [text], app)


def test_node_pipeline_of_transformers_js_gives_the_same_vectors(
    searched: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The folder as it is. Both run onnxruntime's kernels, of other releases: a cosine of 0.999."""
    (tmp_path / "bundle").symlink_to(searched / INT4)
    shutil.copyfile(shipped("export/apps/node/package.json"), tmp_path / "package.json")
    app = installed(tmp_path)
    (app / "embed.mjs").write_text(
        'import { env, pipeline } from "@huggingface/transformers";\n'
        'env.allowRemoteModels = false; env.localModelPath = "./";\n'
        'const embed = await pipeline("feature-extraction", "bundle");\n'
        f'const found = await embed({json.dumps(TEXTS)}, {{ pooling: "mean", normalize: true }});\n'
        "const whole = await embed.model(embed.tokenizer("
        f"{json.dumps(TEXTS)}, {{ padding: true }}));\n"
        "console.log(JSON.stringify([found.tolist(), whole.sentence_embedding.tolist()]));\n"
    )
    ours = vectors_of(searched)
    for theirs in json.loads(run(app, "node", "embed.mjs")):
        np.testing.assert_array_less(0.999, (np.array(theirs) * ours).sum(-1))


@contextmanager
def served(app: Path) -> Iterator[str]:
    """`npm start`, on a port that is free."""
    server = subprocess.Popen(["node", "serve.mjs", "0"], cwd=app, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


def seen(app: Path, questions: list[Any], device: str, folder: Path) -> dict[str, Any]:
    """What Chromium shows of the page: answers, and what its check says; skips where there is no Chromium."""
    shutil.copyfile(Path(__file__).parent / "page.mjs", folder / "page.mjs")
    (folder / "node_modules").symlink_to(puppeteer())
    forms = [fields(question, app) for question in questions]
    given = json.dumps({"chromium": chromium(), "questions": forms})
    with served(app) as address:
        words = ["node", "page.mjs", f"{address}/?device={device}"]
        done = subprocess.run(words, cwd=folder, input=given, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def fields(question: Any, app: Path) -> dict[str, str]:
    """A question as the page's form has it."""
    if isinstance(question, dict):
        return {name: "\n".join(given) if isinstance(given, list) else given for name, given in question.items()}
    return {"sound": str(app / question)} if question.endswith(".wav") else {"text": question}


def test_web_page_on_wasm_computes_what_was_measured_and_speaks_to_nobody(
    asked: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    bundle, questions = asked
    app = installed(exported("web", bundle, tmp_path / "app"))
    found = seen(app, questions, "wasm", tmp_path)
    assert found["isolated"]  # so that WebAssembly may use threads
    assert not found["outside"]
    assert not found["errors"]
    assert found["title"] == "recipe"
    assert found["checked"].startswith("Yes: same "), found["checked"]
    agree(found["answers"], predicted(bundle, questions, app))


def agree(shown: list[str], expected: list[dict[str, Any]]) -> None:
    """What the page shows and qft's answers. A text at the border of random layers' labels falls to either side elsewhere."""
    clear = [answer for answer in expected if "accepted" not in answer or answer["probability"] > 0.6]
    assert clear
    for said, answer in zip(shown, expected, strict=True):
        if answer in clear:
            assert alike(said, answer), (said, answer)


@pytest.mark.parametrize("job", ["finished", "translated", "classified"])
def test_web_page_on_webgpu_answers_as_qft_does(job: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """By Chromium's software adapter, which is too slow for more golden cases than the clearest one."""
    bundle = request.getfixturevalue(job) / INT4
    questions = next(asked for fixture, asked in JOBS.values() if fixture == job)[: 4 if job == "classified" else 1]
    app = installed(exported("web", bundle, tmp_path / "app"))
    manifest = json.loads((app / "bundle/qft.json").read_text())
    manifest["golden"] = sorted(manifest["golden"], key=lambda case: min(a - b for a, b, *_ in case["top_logits"]))[-1:]
    (app / "bundle/qft.json").write_text(json.dumps(manifest))
    found = seen(app, questions, "webgpu", tmp_path)
    if not found["gpu"]:
        pytest.skip("this Chromium has no WebGPU adapter, not even in software")
    assert found["checked"].startswith("Yes: same first choice at 100.0 % of "), found["checked"]
    if job == "classified":
        agree(found["answers"], predicted(bundle, questions, app))
    else:
        assert found["answers"] == answers_of(bundle, questions, app)


def test_web_server_gives_away_nothing_but_the_app(finished: Path, tmp_path: Path) -> None:
    if not shutil.which("node"):
        pytest.skip("node is not installed (apt-get install nodejs)")
    (tmp_path / "secret").write_text("secret")
    app = exported("web", finished / INT4, tmp_path / "app")
    with served(app) as address:
        host = address.removeprefix("http://")
        for path in ("/..%2fsecret", "/%2e%2e/secret", "/../secret", "/%", "/bundle"):
            connection = http.client.HTTPConnection(host)
            connection.request("GET", path)
            assert connection.getresponse().status == 404, path
            connection.close()
        connection.request("GET", "/")
        headers = connection.getresponse().headers
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"


def test_an_app_is_made_whole_or_not_at_all(finished: Path, tmp_path: Path, typed: Type) -> None:
    bundle = shutil.copytree(finished / INT4, tmp_path / "bundle")
    done = typed(finished, f"qft export --app web {tmp_path / 'new/app'} --json")
    assert json.loads(done.stdout)["steps"] == [f"cd {tmp_path / 'new/app'}", *APPS["web"].steps]
    again = typed(tmp_path, f"qft export --app web {bundle} new/app")
    assert again.returncode == 2
    assert "is there already" in again.stderr
    (bundle / "config.json").write_text("{}")
    broken = typed(tmp_path, f"qft export --app web {bundle} other")
    assert broken.returncode == 1
    assert "config.json" in broken.stderr
    assert not (tmp_path / "other").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]


def test_a_text_is_fed_as_qft_feeds_it(asked: tuple[Path, list[Any]]) -> None:
    bundle, questions = Bundle.load(asked[0]), asked[1]
    around = bundle.manifest["feeding"]
    if bundle.writes:
        for text in questions:
            fed = around["before"] + text + around["after"]
            ids = bundle.tokenizer.encode(fed, add_special_tokens=around["special_tokens"])
            assert ids == bundle.prompt_ids(text)
    assert around["stop_ids"] == list(bundle.stop_ids)


def onnxruntime_for_cpp() -> Path:
    """A folder with onnxruntime's include/ and lib/; skips where there is none, or no compiler."""
    if not (shutil.which("cmake") and shutil.which("g++")):
        pytest.skip("not compiled here: cmake and g++ are not installed")
    for folder in (os.environ.get("ONNXRUNTIME"), "/usr/local", "/usr"):
        if folder and list(Path(folder, "include").rglob("onnxruntime_cxx_api.h")):
            return Path(folder)
    pytest.skip("not compiled here: onnxruntime's headers are not found (ONNXRUNTIME names an unpacked release)")


@pytest.mark.parametrize("job", ["finished", "classified"])
def test_cpp_app_computes_what_was_measured_and_answers_as_qft_does(
    job: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    headers, bundle = onnxruntime_for_cpp(), request.getfixturevalue(job) / INT4
    app = exported("cpp", bundle, tmp_path / "app")
    run(app, "cmake", "-B", "build", "-D", f"ONNXRUNTIME={headers}")
    run(app, "cmake", "--build", "build")
    assert json.loads(run(app, "build/answer", "bundle", "--check"))["agrees"]
    opened = Bundle.load(bundle)
    for text in next(asked for fixture, asked in JOBS.values() if fixture == job):
        around = opened.manifest["feeding"]
        ids = opened.tokenizer.encode(
            around["before"] + text + around["after"], add_special_tokens=around["special_tokens"]
        )
        said = run(app, "build/answer", "bundle", *map(str, ids)).strip()
        if opened.writes:
            said = opened.tokenizer.decode([int(number) for number in said.split()])
        assert alike(said, *predicted(bundle, [text], app))


def test_java_app_is_compiled(finished: Path, tmp_path: Path) -> None:
    jars = [Path(found) for found in os.environ.get("JAVA_JARS", "").split(os.pathsep) if found]
    if not (shutil.which("javac") and jars):
        pytest.skip("not compiled here: JAVA_JARS names no jars of onnxruntime, DJL's tokenizers and Gson")
    app = exported("java", finished / INT4, tmp_path / "app")
    classes = os.pathsep.join(map(str, jars))
    run(app, "javac", "-d", "classes", "-cp", classes, "Answer.java")
    found = run(app, "java", "-cp", f"classes{os.pathsep}{classes}", "Answer", "bundle", "--check")
    assert json.loads(found)["agrees"]
