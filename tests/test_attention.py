"""The attention pass: the fused decoder against the one optimum exported, under onnxruntime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qft.bundle.session import OnnxRunner
from qft.errors import InputError
from qft.graph.attention import fuse_attention
from qft.graph.export_optimum import export_float
from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.quant.grids import Grids, Scheme
from qft.targets import FUSIONS
from tests.conftest import loaded_operators

VOCABULARY, POSITIONS = 320, 256
CLOSE = 1e-5  # of the largest logit: float32 sums of some hundred products, in another order


def fused_copy(path: Path) -> Path:
    model = ir.load(path)
    assert fuse_attention(model, positions=POSITIONS)
    target = path.with_name("fused.onnx")
    ir.save(model, target, external_data=f"{target.name}_data")
    return target


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    export_float(tiny_model, folder, graphs=["model"], export_task="text-generation-with-past")
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def fused(plain: Path) -> Path:
    return fused_copy(plain)


def differences(plain: Path, fused: Path, steps: Sequence[int], filled_up: Sequence[int], *, left: bool) -> list[float]:
    """Of a batch that is read in steps, as any runtime would: the largest difference at real tokens, in the largest logit."""
    sessions = [ort.InferenceSession(path) for path in (plain, fused)]
    pasts: list[dict[str, np.ndarray]] = [
        {i.name: np.zeros((len(filled_up), i.shape[1], 0, i.shape[3]), np.float32) for i in s.get_inputs() if "past" in i.name}
        for s in sessions
    ]  # fmt: skip
    chance, mask, found = np.random.default_rng(0), np.zeros((len(filled_up), 0), np.int64), []
    for number, count in enumerate(steps):
        new = np.ones((len(filled_up), count), np.int64)
        for row, places in zip(new, filled_up if number == 0 else (), strict=False):
            row[slice(places) if left else slice(count - places, None)] = 0
        mask = np.concatenate([mask, new], axis=1)
        fed = {"input_ids": chance.integers(3, VOCABULARY, new.shape), "attention_mask": mask}
        fed["position_ids"] = np.maximum(mask.cumsum(-1) - 1, 0)[:, -count:]
        logits = []
        for place, session in enumerate(sessions):
            named = {i.name for i in session.get_inputs()}
            outputs = [o.name for o in session.get_outputs()]
            feed = {name: value for name, value in (fed | pasts[place]).items() if name in named}
            out = dict(zip(outputs, session.run(outputs, feed), strict=True))
            pasts[place] = {name: out[name.replace("past_key_values", "present")] for name in pasts[place]}
            logits.append(out["logits"][new > 0])
        found.append(float(abs(logits[0] - logits[1]).max() / abs(logits[0]).max()))
    return found


@pytest.mark.parametrize(
    ("steps", "filled_up", "left"),
    [
        ([7, 1, 1], [0], True),
        ([7, 5, 1, 9], [0], True),
        ([1, 1, 1], [0], True),
        ([9, 1, 1], [2, 4, 0], True),
        ([9, 1, 4, 1], [3], True),
        ([9, 1, 1], [0, 4, 2], False),
    ],
)
def test_the_fused_graph_gives_the_same_logits(
    steps: list[int], filled_up: list[int], left: bool, plain: Path, fused: Path
) -> None:
    assert max(differences(plain, fused, steps, filled_up, left=left)) < CLOSE


def test_every_layer_is_one_operator_and_inputs_and_outputs_are_what_they_were(plain: Path, fused: Path) -> None:
    sessions = [ort.InferenceSession(path) for path in (plain, fused)]
    assert len({tuple((i.name, tuple(i.shape)) for i in s.get_inputs()) for s in sessions}) == 1
    assert len({tuple((o.name, tuple(o.shape)) for o in s.get_outputs()) for s in sessions}) == 1
    graph = ir.load(fused).graph
    kinds = [node.op_type for node in graph]
    assert kinds.count("GroupQueryAttention") == 2
    assert not {"Softmax", "Expand", "Where"} & set(kinds)


def test_a_mask_that_is_not_causal_is_left_alone(plain: Path) -> None:
    model = ir.load(plain)
    (compare,) = (node for node in model.graph if node.op_type == "LessOrEqual")
    compare.op_type = "GreaterOrEqual"
    assert fuse_attention(model, positions=POSITIONS) == 0
    assert "Softmax" in [node.op_type for node in model.graph]


def test_heads_that_are_rotated_otherwise_are_left_alone(plain: Path) -> None:
    model = ir.load(plain)
    negated = next(node for node in model.graph if node.op_type == "Neg")
    negated.op_type = "Identity"
    assert fuse_attention(model, positions=POSITIONS) == 0


@pytest.fixture(scope="module")
def runners(plain: Path, fused: Path) -> tuple[OnnxRunner, OnnxRunner]:
    return OnnxRunner(plain, pad_id=2), OnnxRunner(fused, pad_id=2)


def texts(*lengths: int, prefix: int = 0) -> list[list[int]]:
    chance = np.random.default_rng(1)
    shared = chance.integers(3, VOCABULARY, prefix).tolist()
    return [shared + chance.integers(3, VOCABULARY, length).tolist() for length in lengths]


@pytest.mark.parametrize(
    ("prompts", "tokens"),
    [(texts(9), 140), (texts(4, 9, 7), 20), (texts(4, 9, 7, prefix=40), 20)],
    ids=["one that outgrows its buffer", "batch", "prefix"],
)
def test_what_is_written_is_the_same(
    prompts: list[list[int]], tokens: int, runners: tuple[OnnxRunner, OnnxRunner]
) -> None:
    expected, found = (runner.generate(prompts, max_new_tokens=tokens, stop_ids=()) for runner in runners)
    assert found == expected


def test_logits_of_rows_that_share_a_beginning_are_the_same(runners: tuple[OnnxRunner, OnnxRunner]) -> None:
    expected, found = (runner.logits(texts(4, 9, 7, prefix=40), 3) for runner in runners)
    np.testing.assert_allclose(found, expected, atol=CLOSE * abs(expected).max())


def test_a_row_that_a_longer_one_begins_with_keeps_all_the_logits_that_are_wanted(
    runners: tuple[OnnxRunner, OnnxRunner],
) -> None:
    (longer,) = texts(60)
    shorter, keep = longer[:20], 12
    for runner in runners:
        expected, found = runner.logits([shorter], keep)[0], runner.logits([shorter, longer], keep)[0]
        np.testing.assert_allclose(found, expected, atol=CLOSE * abs(expected).max())


def test_several_tokens_after_what_several_rows_have_read(runners: tuple[OnnxRunner, OnnxRunner]) -> None:
    more = texts(5, 5)
    logits = []
    for runner in runners:
        _, cache = runner.prefill(texts(4, 9))
        read, cache = runner.extend(more, cache)
        logits.append(np.concatenate([read[:, -1:], runner.step([7, 8], cache)[0]]))
    np.testing.assert_allclose(logits[1], logits[0], atol=CLOSE * abs(logits[0]).max())


def test_two_that_go_on_from_the_same_tokens_do_not_disturb_each_other(fused: Path) -> None:
    runner = OnnxRunner(fused, pad_id=2)
    (prompt,), one, other = texts(9), [5, 6, 7], [8, 9, 10]
    _, cache = runner.prefill([prompt])
    _, first = runner.extend([one], cache)
    _, second = runner.extend([other], cache)
    for rest, branch in ((one, first), (other, second)):
        expected, _ = runner.prefill([[*prompt, *rest, 11]])
        found, _ = runner.step([11], branch)
        np.testing.assert_allclose(found[0, -1], expected[0, -1], atol=CLOSE * abs(expected).max())
    assert first.past is cache.past  # and the first one was not copied


def test_the_head_is_computed_only_where_logits_are_wanted(fused: Path) -> None:
    runner, batch = OnnxRunner(fused, pad_id=2), texts(4, 9)
    every, _ = runner.prefill(batch, keep=9)
    for keep in (1, 3):
        found, _ = runner.prefill(batch, keep=keep)
        assert found.shape[:2] == (2, keep)
        np.testing.assert_allclose(found, every[:, -keep:], atol=CLOSE * abs(every).max())


def test_a_text_longer_than_the_model_was_made_for_is_read_as_before(runners: tuple[OnnxRunner, OnnxRunner]) -> None:
    theirs, ours = (runner.logits(texts(3 * POSITIONS), 1) for runner in runners)
    assert np.abs(ours - theirs).max() <= CLOSE * np.abs(theirs).max()


def test_a_text_longer_than_the_angles_is_the_users_error(fused: Path) -> None:
    with pytest.raises(InputError, match="9,000 tokens are more than the 8,192 that this bundle reads"):
        OnnxRunner(fused, pad_id=2).logits(texts(9000), 1)


def written(source: Path, name: str, fuse: Sequence[str]) -> tuple[Path, Counter[str]]:
    """The file, and how many operators it has of each kind. No activation is rounded: only the order of sums differs."""
    plan = GraphPlan(Grids(Scheme(8, 32), head=Scheme(8, 32)), 0, fuse=fuse, positions=POSITIONS)
    target = source.with_name(f"{name}.onnx")
    quantize_graph(source, target, plan, {})
    return target, Counter(node.op_type for node in ir.load(target).graph)


@pytest.mark.parametrize("name", ["attention", "norms", "products"])
def test_each_fusion_gives_the_same_logits_alone_and_can_be_left_out(plain: Path, name: str) -> None:
    others = [other for other in FUSIONS if other != name]
    (none, nothing), (alone, some) = written(plain, "none", ()), written(plain, "alone", [name])
    (whole, everything), (without, fewer) = written(plain, "all", FUSIONS), written(plain, "without", others)
    assert some != nothing
    assert fewer != everything
    for one, other in ((none, alone), (none, whole), (none, without)):
        assert max(differences(one, other, [9, 1, 4, 1], [3], left=True)) < CLOSE
        assert max(differences(one, other, [9, 1, 1], [2, 8, 0], left=True)) < CLOSE


def test_norms_but_the_first_take_the_sums_before_them(plain: Path) -> None:
    """Two of each layer, and the last one. The first has no sum; of it, and of gates, onnxruntime makes operators as it loads."""
    path, kinds = written(plain, "all", FUSIONS)
    assert kinds["SkipSimplifiedLayerNormalization"] == 4
    assert kinds["Pow"] == 1
    loaded = loaded_operators(path)
    assert {
        name: loaded[name] for name in ("SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "QuickGelu")
    } == {
        "SkipSimplifiedLayerNormalization": 4,
        "SimplifiedLayerNormalization": 1,
        "QuickGelu": 2,
    }
    assert not loaded.keys() & {"Pow", "Sigmoid", "Sin", "Cos"}
    without, _ = written(plain, "without", [name for name in FUSIONS if name != "norms"])
    assert loaded_operators(without)["SkipSimplifiedLayerNormalization"] == 0  # or the pass is needed no more
