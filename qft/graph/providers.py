"""Which operators of a graph its execution provider has no kernel for: told from names alone, before anything is exported or run there.

onnxruntime runs such nodes on the processor, and what they read and write is copied to it and back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from qft.recipe_yaml import read_yaml
from qft.targets import Target

_MICROSOFT = "com.microsoft::"
_FOLDED = "Constant"  # no kernel is asked for: onnxruntime makes values of these as it loads


def without_kernel(target: Target, operators: Iterable[str]) -> list[str]:
    """Those of `operators` that the target's provider lacks; of the processor's, which everything is tried on, none.

    Names are as onnxruntime writes them, `Add` and `com.microsoft::MatMulNBits`.
    """
    if target.provider == "cpu":
        return []
    known = read_yaml(Path(__file__).with_suffix(".yaml").read_text("utf-8")).value[target.provider]
    served = {*known["onnx"].split(), *(_MICROSOFT + name for name in known["microsoft"].split()), _FOLDED}
    return sorted(set(operators) - served)


def written(target: Target) -> list[str]:
    """onnxruntime's own operators that a target's profile asks for, whatever the model."""
    found = ["MatMulNBits"] * bool(target.linear) + ["GatherBlockQuantized"] * bool(target.head)
    found += ["GroupQueryAttention"] * ("attention" in target.fusions)
    found += ["SkipSimplifiedLayerNormalization"] * ("norms" in target.fusions)
    return [_MICROSOFT + name for name in found]


def lacking(targets: Sequence[Target], files: Iterable[Path] = ()) -> dict[str, list[str]]:
    """Target → what its provider lacks of what the target asks for, and of float graphs, before anything is made of them."""
    elsewhere = [target for target in targets if target.provider != "cpu"]
    found = {operator for file in files for operator in count_operators(file)} if elsewhere else set()
    operators = {target.name: without_kernel(target, [*found, *written(target)]) for target in elsewhere}
    return {name: names for name, names in operators.items() if names}


def count_operators(path: Path) -> Counter[str]:
    """Operator → nodes of an ONNX file, those of branches too; no weight is read."""
    import onnx_ir as ir

    graph = ir.load(path).graph
    return Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in ir.traversal.RecursiveGraphIterator(graph)
    )
