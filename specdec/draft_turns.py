"""Whose turn it is to be drafted for: a request whose drafts do not pay for the drafting rests, and is asked again.

What a draft is worth is known before it is verified: the chances of the nodes that were chosen, less what their
verification costs. A request is drafted for in every step while the recent worth is above the price of drafting. Where
it is not, the request rests for a number of steps that all requests share: it grows with every trial that was in vain
and shrinks with every one that was not, the more, the more it brought. So trials go on where one in five pays for
itself, or one in fifteen for all of them. On a busy machine whose texts do not repeat, drafting costs next to nothing;
a request that begins to copy is found.

Source: the exponential back-off of Cascade (2506.20675), for requests instead of the whole engine and on expected
instead of measured gain, which is known without the noise of acceptance.
"""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["DraftTurns"]

_NEWEST = 0.5  # share of a new draft in what a request's drafts are worth
_LONGER, _SHORTER = 1.15, 0.6  # the rest after a trial in vain, and after one that brought its price once more
_MOST_PRICES = 4.0
_MOST_STEPS = 64.0
_CHEAP = 0.05  # tokens: drafting that costs less than this is not worth missing the first step of a copy for
_GOLDEN = 0.618  # spreads numbers evenly over [0, 1)


class DraftTurns:
    """Decides by request; knows tokens only."""

    def __init__(self) -> None:
        self._worth: dict[str, float] = {}  # tokens above the price, of requests that were drafted for
        self._resting: dict[str, int] = {}  # steps left
        self._rest = 1.0
        self._num_new = 0

    def may_draft(self, request_id: str) -> bool:
        """Asked once for each request and step."""
        left = self._resting.get(request_id)
        if left is None:  # of new requests not all are tried at once where trials are mostly in vain
            self._num_new += 1
            left = int(self._num_new * _GOLDEN % 1.0 * (round(self._rest) - 1))
            self._resting[request_id] = left
        if left > 0:
            self._resting[request_id] = left - 1
        return left <= 0

    def note(self, request_id: str, worth: float, price: float) -> None:
        """A draft was made.

        Args:
            request_id: whose.
            worth: tokens that its chosen nodes are expected to bring, less those that the time of their verification
                would bring elsewhere.
            price: tokens that the time of the drafting would bring elsewhere.
        """
        surplus = worth - price
        if price < _CHEAP:
            self._worth[request_id], self._resting[request_id] = surplus, 0
            return
        before = self._worth.get(request_id)
        is_trial = before is None or before <= 0
        # A success counts in full, as does the first draft: who begins to copy is not held back by its past.
        now = surplus if is_trial else before + _NEWEST * (surplus - before)  # type: ignore[operator]
        self._worth[request_id] = now
        if is_trial:
            change = _LONGER if surplus <= 0 else _SHORTER ** min(surplus / max(price, 1e-9), _MOST_PRICES)
            self._rest = min(max(self._rest * change, 1.0), _MOST_STEPS)
        self._resting[request_id] = 0 if now > 0 else round(self._rest) - 1

    def keep(self, live: Collection[str]) -> None:
        """Forget all requests but these."""
        self._worth = {name: worth for name, worth in self._worth.items() if name in live}
        self._resting = {name: left for name, left in self._resting.items() if name in live}

    def __len__(self) -> int:
        return len(self._worth)
