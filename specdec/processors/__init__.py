"""The target's logits processors, applied to every node of a batch of draft trees on the node's true prefix."""

from specdec.processors.base import Op, PerNode, run
from specdec.processors.compile import compile_processors
from specdec.processors.fused import fused_law
from specdec.processors.nodes import NodeBatch
from specdec.processors.objects import OutputPenaltyLogitsProcessor

__all__ = ["NodeBatch", "Op", "OutputPenaltyLogitsProcessor", "PerNode", "compile_processors", "fused_law", "run"]
