"""Which requests' processors the drawing kernel does itself, and with which numbers.

A request is fused if its processors are some of these, each at most once, in this order:

| processor | condition |
| --- | --- |
| logit bias | of single tokens |
| repetition penalty | |
| presence and frequency penalties | |
| temperature | the request samples |
| top-k | the request samples; k <= 1024 |
| top-p, min-p | the request samples |

Everything else (banned and forced tokens, n-grams, typical, epsilon and eta sampling, a user's own processors, another
order) runs before the kernel as torch operations, and so do all other processors of that request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from specdec.kernels.node_laws import MAX_TOP_K, Law
from specdec.processors.base import Op
from specdec.processors.counts import OutputPenalty, RepetitionPenalty
from specdec.processors.rules import SequenceBias
from specdec.processors.warpers import MinP, Temperature, TopK, TopP

__all__ = ["fused_law"]

_ORDER: Final[tuple[type[Op], ...]] = (
    SequenceBias, RepetitionPenalty, OutputPenalty, Temperature, TopK, TopP, MinP,
)  # fmt: skip


def fused_law(ops: Sequence[Op], seed: int | None, vocab_size: int) -> Law | None:
    """The law that the kernel computes for a request, or None if it cannot.

    Args:
        ops: the request's processors in order.
        seed: of its noise; None: greedy.
        vocab_size: V.
    """
    places = [_ORDER.index(type(op)) if type(op) in _ORDER else -1 for op in ops]
    if -1 in places or any(later <= earlier for earlier, later in zip(places, places[1:], strict=False)):
        return None
    found = {type(op): op for op in ops}
    bias, repeated, written = found.get(SequenceBias), found.get(RepetitionPenalty), found.get(OutputPenalty)
    heat, top_k, top_p, min_p = (found.get(kind) for kind in (Temperature, TopK, TopP, MinP))
    if seed is None and places and places[-1] >= _ORDER.index(Temperature):
        return None  # a division can make two scores equal, and then the first of them wins
    everywhere = bias.everywhere(vocab_size) if isinstance(bias, SequenceBias) else None
    k = int(top_k.value) if isinstance(top_k, TopK) else 0
    if (bias is not None and everywhere is None) or min(k, vocab_size) > MAX_TOP_K:
        return None
    return Law(
        seed,
        temperature=heat.value if isinstance(heat, Temperature) else 1.0,
        repetition=repeated.penalty if isinstance(repeated, RepetitionPenalty) else 1.0,
        frequency=written.frequency if isinstance(written, OutputPenalty) else 0.0,
        presence=written.presence if isinstance(written, OutputPenalty) else 0.0,
        top_k=min(k, vocab_size),
        tail=top_p.value if isinstance(top_p, TopP) else -1.0,
        min_p=min_p.value if isinstance(min_p, MinP) else 0.0,
        seen=repeated.seen_table if isinstance(repeated, RepetitionPenalty) else None,
        counts=written.counts if isinstance(written, OutputPenalty) else None,
        bias=everywhere,
    )
