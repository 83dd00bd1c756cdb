"""Codes, scales and zero points against a float64 reference, and against what onnxruntime computes with them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qft.quant.grids import Quantized, Scheme, dequantize, pack, quantize_nearest, unpack
from qft.quant.store import load_matrices, save_matrices

INT4 = Scheme(4, 32)
SCHEMES = st.builds(
    Scheme,
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 64, 128]),
    symmetric=st.booleans(),
    scale_type=st.sampled_from([torch.float32, torch.float16]),
)


def matrix_of(kind: str, rows: int, cols: int, seed: int) -> torch.Tensor:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    if kind == "zeros":
        return torch.zeros(rows, cols)
    if kind == "constant":
        return torch.full((rows, cols), 0.37)
    if kind == "outlier":
        weight[:, cols // 2] *= 100
    return weight


def in_onnxruntime(matrix: Quantized, x: np.ndarray, level: int) -> np.ndarray:
    """x Wᵀ by MatMulNBits, in the type of the scales."""
    bits = matrix.scheme.bits
    stored = {"codes": pack(matrix.codes, bits), "scales": matrix.scales}
    if not matrix.scheme.symmetric:
        stored["zeros"] = pack(matrix.zero_points, bits)
    constants = [ir.val(name, const_value=ir.tensor(t.numpy(), name=name)) for name, t in stored.items()]
    single = matrix.scheme.scale_type == torch.float32
    kind = ir.DataType.FLOAT if single else ir.DataType.FLOAT16
    fed = ir.val("x", dtype=kind, shape=ir.Shape(x.shape))
    sizes = {"bits": bits, "block_size": matrix.scheme.block, "K": matrix.cols, "N": len(matrix.codes)}
    node = ir.node(
        "MatMulNBits", [fed, *constants], domain="com.microsoft", attributes={**sizes, "accuracy_level": level}
    )
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", kind, ir.Shape((len(x), len(matrix.codes)))
    graph = ir.Graph(
        [fed], [y], nodes=[node], initializers=constants, opset_imports={"": 18, "com.microsoft": 1}, name="g"
    )
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString())
    return session.run(None, {"x": x.astype(np.float32 if single else np.float16)})[0]


@given(
    scheme=SCHEMES,
    kind=st.sampled_from(["random", "zeros", "constant", "outlier"]),
    rows=st.integers(1, 40),
    cols=st.integers(1, 200),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_the_weights_are_onnxruntimes_to_the_bit(scheme: Scheme, kind: str, rows: int, cols: int, seed: int) -> None:
    matrix = quantize_nearest(matrix_of(kind, rows, cols, seed), scheme)
    read_out = in_onnxruntime(matrix, np.eye(cols), level=0).T
    assert np.array_equal(read_out, dequantize(matrix).numpy().astype(read_out.dtype))


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_products_are_onnxruntimes(bits: int, block: int, symmetric: bool) -> None:
    torch.manual_seed(block)
    matrix = quantize_nearest(torch.randn(96, 576), Scheme(bits, block, symmetric))
    x = np.random.default_rng(0).standard_normal((7, 576)).astype(np.float32)
    exact = x.astype(np.float64) @ dequantize(matrix).double().numpy().T
    size = np.linalg.norm(exact)
    assert np.linalg.norm(in_onnxruntime(matrix, x, level=0) - exact) < 1e-6 * size  # float32 sums
    assert np.linalg.norm(in_onnxruntime(matrix, x, level=4) - exact) < 1e-2 * size  # activations in int8 by blocks


@given(
    rows=st.integers(1, 5), cols=st.integers(1, 70), scheme=SCHEMES.filter(lambda s: s.scale_type == torch.float32),
    seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_rounding_is_as_good_as_a_float64_reference(rows: int, cols: int, scheme: Scheme, seed: int) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    matrix = quantize_nearest(weight, scheme)
    error = (dequantize(matrix).double() - weight.double()).abs()
    plain = np.abs(quantize_plain(weight.double().numpy(), scheme) - weight.double().numpy())
    # A zero point that lies between two codes may round the other way in float32: half a step for a whole block.
    steps = matrix.scales.double().repeat_interleave(scheme.block, 1)[:, :cols]
    if scheme.bits == 8:
        assert (error <= 1.01 * steps).all()
        assert error.square().sum() <= 4 * np.square(plain).sum() + steps.square().sum() / 12
    else:  # each block tries clipped ranges and keeps the best, so it is seldom worse and mostly better
        assert error.square().sum() <= 1.25 * np.square(plain).sum() + 1e-9


def quantize_plain(weight: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Rounding to the whole range in float64, written out block by block."""
    out = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], scheme.block):
            part = weight[row, start : start + scheme.block]
            low, high = min(part.min(), 0), max(part.max(), 0)
            if scheme.symmetric:
                zero = 2 ** (scheme.bits - 1)
                scale = max(-low, high) / (zero - 1) or 1.0
            else:
                scale = (high - low) / scheme.top or 1.0
                zero = np.clip(np.round(-low / scale), 0, scheme.top)
            codes = np.clip(np.round(part / scale) + zero, 0, scheme.top)
            out[row, start : start + scheme.block] = (codes - zero) * scale
    return out


@given(count=st.integers(1, 33), seed=st.integers(0, 99))
def test_packing_is_undone_by_unpacking(count: int, seed: int) -> None:
    values = torch.randint(0, 16, (3, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(unpack(pack(values, 4), 4, count), values)
    assert pack(values, 4)[0, 0] == values[0, 0] | ((values[0, 1] if count > 1 else 0) << 4)  # low nibble first


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_stays_exactly_zero(symmetric: bool) -> None:
    weight = torch.randn(8, 64) + 3
    weight[:, ::7] = 0
    assert (dequantize(quantize_nearest(weight, Scheme(4, 32, symmetric)))[:, ::7] == 0).all()


@given(scheme=SCHEMES, cols=st.integers(1, 150), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_matrices_come_back_from_the_disk(
    tmp_path_factory: pytest.TempPathFactory, scheme: Scheme, cols: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("store") / "matrices.safetensors"
    matrix = quantize_nearest(matrix_of("random", 5, cols, seed), scheme)
    save_matrices(path, {"a.layer": matrix})
    (found,) = load_matrices(path).values()
    assert (found.scheme, found.cols) == (scheme, cols)
    for name in ("codes", "scales", "zero_points"):
        assert torch.equal(getattr(found, name), getattr(matrix, name))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (Scheme(4, 32), 64 * 128 // 2 + 64 * 4 * 4 + 64 * 2),
        (Scheme(8, 32), 64 * 128 + 64 * 4 * 4 + 64 * 4),
        (Scheme(8, 64, symmetric=True), 64 * 128 + 64 * 2 * 4),
        (Scheme(4, 32, scale_type=torch.float16), 64 * 128 // 2 + 64 * 4 * 2 + 64 * 2),
    ],
)
def test_stored_bytes_count_codes_scales_and_zero_points(scheme: Scheme, expected: int) -> None:
    assert scheme.stored_bytes(64, 128) == expected


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(4, 32, symmetric=True), Scheme(8, 128)])
def test_stored_bytes_of_ragged_columns_are_those_of_the_packed_arrays(scheme: Scheme) -> None:
    matrix = quantize_nearest(torch.randn(5, 200), scheme)
    parts = [pack(matrix.codes, scheme.bits), matrix.scales]
    if not scheme.symmetric:
        parts.append(pack(matrix.zero_points, scheme.bits))
    assert scheme.stored_bytes(5, 200) == sum(part.nbytes for part in parts)


def test_576_columns_in_blocks_of_64_and_128_are_padded_as_onnxruntime_wants() -> None:
    for block, blocks in ((64, 9), (128, 5)):
        matrix = quantize_nearest(torch.randn(3, 576), Scheme(4, block))
        assert matrix.codes.shape == (3, blocks, block)
        assert pack(matrix.zero_points, 4).shape == (3, 5 if blocks == 9 else 3)
