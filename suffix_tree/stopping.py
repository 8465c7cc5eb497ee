"""When a draft is long enough: the step that a token saves against the tokens that are drafted in vain.

Count costs in draft tokens: one token costs 1, a step 1 / threshold. A draft that ends here is taken up again by the
next step, so one more accepted token saves as much as a token costs from here on. In text of its own that is a whole
step, and the token is worth drafting if its path is accepted with a probability of at least ``threshold``. Within a
copy it is much less, as the next step would draft a long piece anyway: there it is better to draft less, to see what is
accepted, and to go on. The trade is that of a checkpoint interval (Young 1974): the cost of a stop against the work
lost behind a fault.

If each token of a copy has hazard k (the negative logarithm of the probability that it is right), pieces of L tokens
cost (1 / threshold + L) / (1 + accepted tokens) for each token of the text. For small k that is least where
1 / P - 1 + log P = (1 / threshold - 1) k, with P = exp(-kL): about L = sqrt(2 / (threshold k)). The mean hazard of the
draft so far, -log(P) / L, stands in for k.
"""

from __future__ import annotations

import numpy as np

from specdec.suffix_tree.memory import kernel

__all__ = ["is_worth_drafting"]


@kernel
def is_worth_drafting(value: float | np.float32, length: int, threshold: float) -> bool:
    """Whether a draft should reach so far.

    Args:
        value: probability that the path of ``length`` tokens is accepted.
        length: at least 1; for one token the second rule follows from the first.
        threshold: cost of a draft token in steps, in [0, 1]; 0 drafts everything, 1 almost nothing.
    """
    if value < threshold:
        return False
    if length == 1 or threshold <= 0.0:
        return True
    path = np.float64(value)
    cost = threshold * length
    # (1 - P - P hazard) cost <= (1 - threshold) P hazard, with 2 (1 - P) / (1 + P) <= hazard <= (1 - P^2) / (2 P): the
    # logarithm is taken only where these bounds leave it open.
    least = cost / (1.0 - threshold + cost)  # of P hazard / (1 - P)
    if least * (1.0 + path) <= 2.0 * path:
        return True
    if 2.0 * least > 1.0 + path:
        return False
    return bool(least * (1.0 - path) <= -path * np.log(path))
