"""Which provider runs which node of a graph, as onnxruntime assigned them when it made the session. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qft.errors import StageError

_MOST_ON_CPU = 0.05  # of the nodes that compute; beyond it the copies to and fro cost what the card gains
# What works on shapes, which onnxruntime keeps on the processor on purpose, and what moves no number.
_OF_SHAPES = {"Shape", "Size", "Gather", "Unsqueeze", "Squeeze", "Concat", "Slice", "Reshape", "Flatten", "Range", "Cast",
              "ConstantOfShape", "Constant", "Identity", "Equal", "Where", "Expand", "MemcpyToHost", "MemcpyFromHost"}  # fmt: skip


@dataclass(frozen=True)
class Assignment:
    """nodes: those that compute. on_cpu: of these, operator → how many the wanted provider did not take."""

    provider: str
    nodes: int
    on_cpu: dict[str, int]

    @property
    def share_on_cpu(self) -> float:
        """Of the nodes that compute."""
        return sum(self.on_cpu.values()) / max(1, self.nodes)

    def check(self) -> None:
        """Raises StageError, with the list, if more than 5 % fell back to the processor."""
        if self.share_on_cpu > _MOST_ON_CPU:
            listed = ", ".join(f"{count} {name}" for name, count in self.on_cpu.items())
            raise StageError(
                f"{self.share_on_cpu:.0%} of the nodes fell back from {self.provider} to the processor: {listed}",
                hint="take a target that is made for it, see docs/gpu.md",
            )


def assigned(session: Any, provider: str) -> Assignment:
    """Of a session that `qft.bundle.session.open_session` made for a provider other than the processor's."""
    found = session.get_provider_graph_assignment_info()
    return count(((part.ep_name, node.op_type) for part in found for node in part.get_nodes()), provider)


def count(nodes: Iterable[tuple[str, str]], provider: str) -> Assignment:
    """nodes: (name of the provider that runs it, operator) of every node. provider: the one that was wanted."""
    computing = [(where, op) for where, op in nodes if op not in _OF_SHAPES]
    away = Counter(op for where, op in computing if where != provider)
    return Assignment(provider, len(computing), dict(away.most_common()))
