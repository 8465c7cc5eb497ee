"""Drafting: candidates vote for the next token, and the draft goes on while acceptance is likely enough.

Each candidate votes for the token that followed it, with a weight of its match length to the fourth power. A *path*
keeps the likeliest token and drops the candidates that said otherwise; a *tree* keeps all and grows the likeliest open
branch first. Both stop where one more token costs more than it saves (``stopping``), so the draft length follows from
cost instead of a tuned factor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree._layout import (
    BRANCH_WIDTH,
    D_INPUT,
    D_PARENT,
    D_TOKEN,
    D_VALUES,
    GROUP_WIDTH,
    GROUPS,
    MAX_BRANCHES,
    MAX_DRAFT,
    MAX_MATCH,
    MAX_MEMBERS,
    NODE_CELLS,
    R_DRAFT,
    R_DRAFTED,
    R_HISTORY,
    R_INDEX,
    R_LENGTH,
    R_SCRATCH,
    R_SHARED,
    R_TOKENS,
    RECORD_WIDTH,
    S_BRANCH,
    S_CANDIDATES,
    S_FLOAT,
    S_GROUP,
    S_INPUTS,
    S_MEMBER,
    S_NEXT,
    X_CELLS,
    X_PAGE_NEXT,
    X_TOKENS,
    X_WEIGHTS,
)
from specdec.suffix_tree.calibration import describe, predict
from specdec.suffix_tree.matching import find_candidates
from specdec.suffix_tree.memory import Int32Array, Int64Array, float32_at, int32_at, int64_at, kernel
from specdec.suffix_tree.paged import position_after
from specdec.suffix_tree.stopping import is_worth_drafting
from specdec.suffix_tree.surroundings import UNKNOWN, survey

__all__ = ["draft_path", "draft_tree"]

FloatArray = npt.NDArray[np.float32]
f4 = np.float32
_LENGTH = S_CANDIDATES + GROUPS
_SOURCE = S_CANDIDATES + 2 * GROUPS
_RANK = S_CANDIDATES + 3 * GROUPS
_BEYOND = S_CANDIDATES + 4 * GROUPS
_DISTANCE = S_CANDIDATES + 5 * GROUPS
# Columns of a group: the candidates that vote for one token.
_G_TOKEN, _G_VOTERS, _G_BEST, _G_REACH, _G_NEWEST = range(5)
# Columns of a branch.
_B_PARENT, _B_TOKEN, _B_FIRST, _B_MEMBERS, _B_DEPTH, _B_INPUTS = range(6)
_SURE = f4(0.999)  # no single token is surer than this, so that long paths end
VOTE_WEIGHT = np.array([min(max(e, 1), 64) ** 4.0 for e in range(MAX_MATCH + MAX_DRAFT + 2)], np.float32)


@kernel
def _read_next(row: Int64Array, s: Int32Array, first: int, count: int) -> None:
    """Write the next token of each member to S_NEXT; WIPED where its text ends."""
    own = int32_at(row[R_TOKENS])
    cached = int32_at(int64_at(row[R_INDEX])[X_TOKENS])
    shared = int32_at(int64_at(row[R_SHARED])[X_TOKENS]) if row[R_SHARED] != 0 else own
    for i in range(count):
        position = s[first + 2 * i]
        source = s[_SOURCE + s[first + 2 * i + 1]]
        # Position 0 of an index is wiped: the end of a response.
        s[S_NEXT + i] = own[position] if source == 0 else (cached[position] if source == 1 else shared[position])


@kernel
def _advance(row: Int64Array, source: int, position: int) -> int:
    if source == 0:
        return position + 1
    x = int64_at(row[R_INDEX] if source == 1 else row[R_SHARED])
    return position_after(position, int32_at(x[X_PAGE_NEXT]))


@kernel
def _vote(s: Int32Array, weight: FloatArray, first: int, count: int, depth: int) -> int:
    """Group the members by their next token; returns the number of groups. Weights of votes go to ``weight``."""
    groups = 0
    for i in range(count):
        token = s[S_NEXT + i]
        if token < 0:
            continue
        candidate = s[first + 2 * i + 1]
        reach = s[_LENGTH + candidate] + depth
        rank = s[_RANK + candidate]
        g = 0
        while g < groups and s[S_GROUP + g * GROUP_WIDTH + _G_TOKEN] != token:
            g += 1
        at = S_GROUP + g * GROUP_WIDTH
        if g == groups:
            groups += 1
            s[at + _G_TOKEN] = token
            s[at + _G_VOTERS] = 1
            s[at + _G_BEST] = candidate
            s[at + _G_REACH] = reach
            s[at + _G_NEWEST] = rank
            weight[g] = VOTE_WEIGHT[reach]
        else:
            s[at + _G_VOTERS] += 1
            weight[g] += VOTE_WEIGHT[reach]
            if reach > s[at + _G_REACH]:
                s[at + _G_REACH] = reach
                s[at + _G_BEST] = candidate
            s[at + _G_NEWEST] = min(s[at + _G_NEWEST], rank)
    return groups


@kernel
def _score_group(
    row: Int64Array, s: Int32Array, g: int, share: float, live: int, depth: int, before: int, last: int, at: int
) -> Any:
    """Acceptance probability of group ``g``'s token; its calibration inputs go to ``s[at:]``."""
    group = S_GROUP + g * GROUP_WIDTH
    best = s[group + _G_BEST]
    voters = s[group + _G_VOTERS]
    length = s[_LENGTH + best]
    if s[_BEYOND + best] == UNKNOWN:
        survey(row, s, best)
    describe(
        s, at, s[_SOURCE + best], length, depth, share, voters, live - voters, s[group + _G_NEWEST],
        s[_BEYOND + best], s[_DISTANCE + best], row[R_HISTORY], before, last, s[group + _G_TOKEN],
    )  # fmt: skip
    x = int64_at(row[R_INDEX])
    return min(predict(float32_at(x[X_CELLS]), float32_at(x[X_WEIGHTS]), s, at), _SURE)


@kernel
def _start(row: Int64Array, s: Int32Array) -> int:
    """Find candidates and make them the members of the root; returns how many there are."""
    count = find_candidates(row, s)
    for i in range(count):
        s[_LENGTH + i] = min(s[_LENGTH + i], MAX_MATCH)
        s[S_MEMBER + 2 * i] = _advance(row, s[_SOURCE + i], s[S_CANDIDATES + i])
        s[S_MEMBER + 2 * i + 1] = i
    return count


@kernel
def _record(record: Int32Array, values: FloatArray, node: int, token: int, parent: int, value: np.float32,
            s: Int32Array, at: int) -> None:  # fmt: skip
    base = node * RECORD_WIDTH
    record[base + D_TOKEN] = token
    record[base + D_PARENT] = parent
    for i in range(NODE_CELLS):
        record[base + D_INPUT + i] = s[at + i]
    values[node] = value


@kernel
def draft_path(row: Int64Array, max_nodes: int, threshold: float) -> int:
    """Draft one path into the request's record; returns its length.

    Args:
        row: the request; its record and R_DRAFTED are written.
        max_nodes: most tokens to draft.
        threshold: cost of a draft token in steps, see ``stopping``.
    """
    s = int32_at(row[R_SCRATCH])
    weight = float32_at(row[R_SCRATCH] + 4 * S_FLOAT)
    record = int32_at(row[R_DRAFT])
    values = float32_at(row[R_DRAFT] + 4 * D_VALUES)
    row[R_DRAFTED] = 0
    count = _start(row, s)
    limit = min(max_nodes, MAX_DRAFT)
    tokens = int32_at(row[R_TOKENS])
    before = tokens[row[R_LENGTH] - 2]
    last = tokens[row[R_LENGTH] - 1]
    value = f4(1.0)
    depth = 0
    while depth < limit and count > 0:
        _read_next(row, s, S_MEMBER, count)
        groups = _vote(s, weight, S_MEMBER, count, depth)
        if groups == 0:
            break
        total = f4(0.0)
        live = 0
        for g in range(groups):
            total += weight[g]
            live += s[S_GROUP + g * GROUP_WIDTH + _G_VOTERS]
        best = f4(-1.0)
        chosen = -1
        at = S_INPUTS  # two places: the best so far and the one under consideration
        for g in range(groups):
            if groups > 1 and weight[g] * f4(8.0) < total:
                continue
            p = _score_group(row, s, g, weight[g] / total, live, depth, before, last, at)
            if p > best:
                best = p
                chosen = g
                at = 2 * S_INPUTS + NODE_CELLS - at
        if chosen < 0:
            break
        value *= best
        if not is_worth_drafting(value, depth + 1, threshold):
            break
        token = s[S_GROUP + chosen * GROUP_WIDTH + _G_TOKEN]
        _record(record, values, depth, token, depth - 1, value, s, 2 * S_INPUTS + NODE_CELLS - at)
        before = last
        last = token
        depth += 1
        kept = 0
        for i in range(count):
            if s[S_NEXT + i] == token and (kept < 6 or depth < 4):  # six voters are enough once a draft is under way
                candidate = s[S_MEMBER + 2 * i + 1]
                s[S_MEMBER + 2 * kept] = _advance(row, s[_SOURCE + candidate], s[S_MEMBER + 2 * i])
                s[S_MEMBER + 2 * kept + 1] = candidate
                kept += 1
        count = kept
    row[R_DRAFTED] = depth
    return depth


@kernel
def _open_branch(row: Int64Array, s: Int32Array, branch: int, members: int, first: int, count: int, token: int,
                 parent: int, depth: int, at: int) -> int:  # fmt: skip
    """Make a branch of the members that vote for ``token``; returns the new end of the member list."""
    b = S_BRANCH + branch * BRANCH_WIDTH
    s[b + _B_FIRST] = S_MEMBER + 2 * members
    for i in range(count):
        if s[S_NEXT + i] == token:
            candidate = s[first + 2 * i + 1]
            s[S_MEMBER + 2 * members] = _advance(row, s[_SOURCE + candidate], s[first + 2 * i])
            s[S_MEMBER + 2 * members + 1] = candidate
            members += 1
    s[b + _B_PARENT] = parent
    s[b + _B_TOKEN] = token
    s[b + _B_MEMBERS] = members - (s[b + _B_FIRST] - S_MEMBER) // 2
    s[b + _B_DEPTH] = depth
    for i in range(NODE_CELLS):
        s[b + _B_INPUTS + i] = s[at + i]
    return members


@kernel
def draft_tree(row: Int64Array, max_nodes: int, threshold: float) -> int:
    """Draft a tree, likeliest branch first; arguments and effects as ``draft_path``. Parents come before children."""
    s = int32_at(row[R_SCRATCH])
    weight = float32_at(row[R_SCRATCH] + 4 * S_FLOAT)
    open_value = float32_at(row[R_SCRATCH] + 4 * (S_FLOAT + GROUPS))
    record = int32_at(row[R_DRAFT])
    values = float32_at(row[R_DRAFT] + 4 * D_VALUES)
    row[R_DRAFTED] = 0
    count = _start(row, s)
    if count == 0:
        return 0
    limit = min(max_nodes, MAX_DRAFT)
    members = count
    branches = 0
    nodes = 0
    first = S_MEMBER
    parent = -1
    value = f4(1.0)
    depth = 0
    tokens = int32_at(row[R_TOKENS])
    before = tokens[row[R_LENGTH] - 2]
    last = tokens[row[R_LENGTH] - 1]
    while nodes < limit:
        _read_next(row, s, first, count)
        groups = _vote(s, weight, first, count, depth)
        total = f4(0.0)
        live = 0
        for g in range(groups):
            total += weight[g]
            live += s[S_GROUP + g * GROUP_WIDTH + _G_VOTERS]
        for g in range(groups):
            p = value * _score_group(row, s, g, weight[g] / total, live, depth, before, last, S_INPUTS)
            fits = branches < MAX_BRANCHES and members + count <= MAX_MEMBERS
            if fits and is_worth_drafting(p, depth + 1, threshold):
                token = s[S_GROUP + g * GROUP_WIDTH + _G_TOKEN]
                members = _open_branch(row, s, branches, members, first, count, token, parent, depth + 1, S_INPUTS)
                open_value[branches] = p
                branches += 1
        if branches == 0:
            break
        best = 0
        for i in range(1, branches):
            if open_value[i] > open_value[best]:
                best = i
        b = S_BRANCH + best * BRANCH_WIDTH
        value = open_value[best]
        above = s[b + _B_PARENT]
        before = record[above * RECORD_WIDTH + D_TOKEN] if above >= 0 else tokens[row[R_LENGTH] - 1]
        last = s[b + _B_TOKEN]
        _record(record, values, nodes, last, above, value, s, b + _B_INPUTS)
        parent = nodes
        nodes += 1
        first = s[b + _B_FIRST]
        count = s[b + _B_MEMBERS]
        depth = s[b + _B_DEPTH]
        branches -= 1
        if best != branches:
            open_value[best] = open_value[branches]
            for i in range(BRANCH_WIDTH):
                s[b + i] = s[S_BRANCH + branches * BRANCH_WIDTH + i]
    row[R_DRAFTED] = nodes
    return nodes
