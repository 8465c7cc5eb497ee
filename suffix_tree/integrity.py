"""The invariants of an index, checked by walking all of it. Slow; for tests, saved files and suspicion."""

from __future__ import annotations

import numpy as np

from specdec.suffix_tree import _layout as at
from specdec.suffix_tree.memory import Int32Array

__all__ = ["check_arrays"]


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise AssertionError(f"the index is damaged: {what}")


def _pages_of(first: int, arrays: dict[str, Int32Array], number: int, num_pages: int) -> list[int]:
    pages: list[int] = []
    page, before = first, 0
    while page != 0:
        _require(0 < page < num_pages and page not in pages, f"response {number} links to page {page}")
        _require(int(arrays["page_owner"][page]) == number, f"page {page} of response {number} has another owner")
        _require(int(arrays["page_prev"][page]) == before, f"page {page} does not link back to page {before}")
        pages.append(page)
        page, before = int(arrays["page_next"][page]), page
    return pages


def check_arrays(arrays: dict[str, Int32Array], header: np.ndarray, numbers: list[int]) -> None:
    """Check pages, ownership, wiping, counts and chains.

    Args:
        arrays: used parts of the index's arrays by name.
        header: the index header.
        numbers: sequence numbers of all cached responses.

    Raises:
        AssertionError: the first broken invariant, in words.
    """
    num_pages = int(header[at.X_NUM_PAGES])
    tokens = arrays["tokens"].reshape(num_pages, at.PAGE_SIZE)
    free = arrays["free"][: int(header[at.X_NUM_FREE])].tolist()
    _require(len(set(free)) == len(free), "a page is twice on the free stack")
    used: list[int] = []
    for number in numbers:
        pages = _pages_of(int(arrays["first_page"][number]), arrays, number, num_pages)
        for page in pages[:-1]:
            _require(bool((tokens[page] != at.WIPED).all()), f"page {page} is not full, but is not the last one")
        if pages:
            filled = tokens[pages[-1]] != at.WIPED
            _require(bool(filled[0] and (np.diff(filled.astype(np.int8)) <= 0).all()), f"page {pages[-1]} has a gap")
        used += pages
    _require(len(set(used)) == len(used), "a page belongs to two responses")
    _require(sorted(used + free) == list(range(1, num_pages)), "a page is neither used nor free, or both")
    _require(bool((tokens[free] == at.WIPED).all() and (tokens[0] == at.WIPED).all()), "a free page has tokens")
    held = int((tokens != at.WIPED).sum())
    _require(
        held == int(header[at.X_NUM_POSITIONS]), f"{held} positions are held, {header[at.X_NUM_POSITIONS]} counted"
    )
    _check_chains(arrays, header, num_pages)


def _check_chains(arrays: dict[str, Int32Array], header: np.ndarray, num_pages: int) -> None:
    limit = num_pages * at.PAGE_SIZE
    for name in ("heads", "links"):
        _require(bool(((arrays[name] >= 0) & (arrays[name] < limit)).all()), f"{name} point outside the index")
    buckets, mask = int(header[at.X_NUM_BUCKETS]), int(header[at.X_BUCKET_MASK])
    _require(mask & (mask + 1) == 0 and mask // 2 < buckets <= mask + 1, f"{buckets} buckets do not fit mask {mask}")
    if int(header[at.X_NUM_RECYCLED]) > 0:
        return  # links of reused positions may form cycles; searches are bounded and compare tokens
    reached = np.zeros(limit, bool)
    for head in arrays["heads"].reshape(-1, at.NUM_ORDERS)[:, 0].tolist():
        position, steps = head, 0
        while position > 0:
            reached[position] = True
            steps += 1
            _require(steps <= limit, f"the chain from position {head} is a cycle")
            position = int(arrays["links"][position * at.NUM_ORDERS])
    inside = int(reached.sum())
    unchained = int(header[at.X_NUM_POSITIONS]) - inside  # the prompt tail's tokens but the last of each response
    owners = len(set(arrays["page_owner"].tolist()) - {0})
    _require(0 <= unchained <= owners * (at.TAIL - 1), f"{unchained} positions are on no chain")
