"""The exact law of a rejection rule as it stands in ``verifier/``: every coin it flips is turned both ways."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch

from specdec.types import DraftTree
from specdec.verifier.ratio_rules import Rule
from tests import enumeration as e


def tree_of(models: e.Models, text: e.Text, branches: e.Branches) -> tuple[DraftTree, torch.Tensor, torch.Tensor]:
    """A draft outcome as the verifier gets it: nodes level by level in drawn order, p [N, V] and q [N, V]."""
    token_ids, parents, paths, q = [0], [-1], [text], [np.zeros(e.V)]
    level = [(0, branches)]
    for parent, children in level:
        for token_id, claimed, below in children:
            level.append((len(parents), below))
            q[parent] = claimed
            token_ids.append(token_id)
            parents.append(parent)
            paths.append((*paths[parent], token_id))
            q.append(np.zeros(e.V))
    tree = DraftTree(np.array(token_ids, dtype=np.int32), np.array(parents, dtype=np.int32))
    p = torch.tensor(np.array([models.p[path] for path in paths]))
    return tree, p, torch.tensor(np.array(q))


def ends(rule: Rule, tree: DraftTree, p: torch.Tensor, q: torch.Tensor) -> Iterator[tuple[float, int, torch.Tensor]]:
    """(probability, last accepted node, law of the bonus token) of every way the coins can fall."""
    scripts: list[tuple[bool, ...]] = [()]
    while scripts:
        script = scripts.pop()
        flips: list[bool] = []
        weight = 1.0

        def accept(probability: float, script: tuple[bool, ...] = script, flips: list[bool] = flips) -> bool:
            nonlocal weight
            outcome = script[len(flips)] if len(flips) < len(script) else probability > 0
            if len(flips) >= len(script) and 0 < probability < 1:
                scripts.append((*flips, False))
            weight *= probability if outcome else 1 - probability
            flips.append(outcome)
            return outcome

        node, weights = rule(tree, p, q, accept)
        yield weight, node, weights / weights.sum()


def rule_law(models: e.Models, rule: Rule, outcomes: e.Outcomes) -> tuple[dict[e.Text, float], float]:
    """Law of the text when the first step is verified by ``rule``, and the mean number of accepted tokens."""
    law: dict[e.Text, float] = defaultdict(float)
    mean_accepted = 0.0
    for weight, branches in outcomes:
        tree, p, q = tree_of(models, (), branches)
        for share, node, bonus in ends(rule, tree, p, q):
            path = tuple(tree.token_ids[tree.path(node)[1:]].tolist())
            mean_accepted += weight * share * len(path)
            for token_id in range(e.V):
                e.add_continuations(law, (*path, token_id), weight * share * float(bonus[token_id]), models)
    return law, mean_accepted


def independent_tree(models: e.Models, text: e.Text) -> e.Outcomes:
    """Two independent draws from q, equal ones kept apart, and one draw below the first of them."""
    law = models.q[text]
    for first, second, third in itertools.product(range(e.V), repeat=3):
        below = models.q[(*text, first)]
        weight = float(law[first] * law[second] * below[third])
        yield weight, ((first, law, ((third, below, ()),)), (second, law, ()))


def deep_tree(models: e.Models, text: e.Text) -> e.Outcomes:
    """Three levels without replacement, shape [2, 1, 1]."""
    for weight, pair in e.sampled_children(models.q[text], 2):
        tails = []
        for token_id in pair:
            laws = models.q[(*text, token_id)], [models.q[(*text, token_id, second)] for second in range(e.V)]
            tails.append(
                [
                    (float(laws[0][second] * laws[1][second][third]), (token_id, second, third))
                    for second, third in itertools.product(range(e.V), repeat=2)
                ]
            )
        for (w0, left), (w1, right) in itertools.product(*tails):
            branches = tuple(
                e.as_chain(path, [models.q[text], models.q[(*text, path[0])], models.q[(*text, *path[:2])]])[0]
                for path in (left, right)
            )
            yield weight * w0 * w1, branches
