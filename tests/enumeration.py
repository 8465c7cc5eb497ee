"""Exact laws of toy texts: random language models as tables, draft processes as lists of outcomes, no sampling.

A draft outcome is a probability and a forest of branches below the root; a branch is a token, the draft law that the
process *claims* to have drawn it from, and its own branches. The match rule does not read the claim, the ratio rules
do. Every process is therefore judged twice on the very same drafts: by the production match walk, and by the ratio
rule, which is lossless for honest, non-anticipating processes only.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specdec.types import DraftTree
from specdec.verifier.match import match_walk

V = 3
Text = tuple[int, ...]
Law = npt.NDArray[np.float64]  # [V]
Branches = tuple["Branch", ...]
Branch = tuple[int, Law, Branches]
Outcomes = Iterable[tuple[float, Branches]]


@dataclass(frozen=True)
class Models:
    """Next-token laws after every text of at most ``num_tokens`` tokens: the target's and two drafters'."""

    num_tokens: int
    p: Mapping[Text, Law]
    q: Mapping[Text, Law]
    q2: Mapping[Text, Law]


Process = Callable[[Models, Text], Outcomes]


def random_models(seed: int, num_tokens: int) -> Models:
    """A target, and two drafters that resemble it somewhat."""
    rng = np.random.default_rng(seed)
    tables: list[dict[Text, Law]] = [{}, {}, {}]
    for length in range(num_tokens + 1):
        for text in itertools.product(range(V), repeat=length):
            p, q, q2 = rng.dirichlet(np.full(V, 0.7), size=3)
            for table, law in zip(tables, (p, 0.6 * p + 0.4 * q, 0.5 * p + 0.5 * q2), strict=True):
                table[text] = law
    return Models(num_tokens, *tables)


def normalised(weights: Law) -> Law:
    return weights / weights.sum()


def target_law(models: Models) -> dict[Text, float]:
    """Probability of every text of ``num_tokens`` tokens."""
    law: dict[Text, float] = defaultdict(float)
    add_continuations(law, (), 1.0, models)
    return law


def add_continuations(law: dict[Text, float], text: Text, mass: float, models: Models) -> None:
    """Spread ``mass`` over the full texts that begin with ``text``, as plain decoding does."""
    if len(text) >= models.num_tokens:
        law[text[: models.num_tokens]] += mass
    elif mass > 0:
        for token_id in range(V):
            add_continuations(law, (*text, token_id), mass * float(models.p[text][token_id]), models)


def total_variation(a: Mapping[Text, float], b: Mapping[Text, float]) -> float:
    return 0.5 * sum(abs(a.get(text, 0) - b.get(text, 0)) for text in a.keys() | b.keys())


# --- the match rule, decoded step by step through the production walk ---------------------------------------------


def match_law(models: Models, process: Process) -> tuple[dict[Text, float], float]:
    """Law of the text when every step drafts by ``process`` and verifies by match; mean accepted of the first step."""
    law: dict[Text, float] = defaultdict(float)
    pending: dict[Text, float] = {(): 1.0}
    mean_accepted = 0.0
    while pending:
        text = min(pending, key=len)  # a step only makes texts longer: nothing is added to this one any more
        mass = pending.pop(text)
        for tree, weight in trees_of(process(models, text)):
            paths = [tuple(tree.token_ids[tree.path(node)[1:]].tolist()) for node in range(len(tree))]
            ends = walk_law(tree, np.array([models.p[(*text, *path)] for path in paths]))  # [N, V]
            for (node, bonus_id), share in np.ndenumerate(ends):
                emitted = (*text, *paths[node], bonus_id)[: models.num_tokens]
                table = law if len(emitted) == models.num_tokens else pending
                table[emitted] = table.get(emitted, 0) + mass * weight * float(share)
            if not text:
                mean_accepted += weight * float(ends.sum(axis=1) @ [len(path) for path in paths])
    return law, mean_accepted


def walk_law(tree: DraftTree, node_laws: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[N, V]: probability that the walk ends at a node with a bonus token, over every draw at every node."""
    num_nodes = len(tree)
    draws = np.indices((V,) * num_nodes, dtype=np.int32).reshape(num_nodes, -1).T  # [V**N, N]
    weights = np.prod(node_laws[np.arange(num_nodes), draws], axis=1)
    cu_nodes = np.arange(0, draws.size + 1, num_nodes, dtype=np.int32)
    token_ids, parents = np.tile(tree.token_ids, len(draws)), np.tile(tree.parents, len(draws))
    nodes, cu_accepted, bonus_ids = match_walk(draws.ravel(), token_ids, parents, cu_nodes)
    ends = np.where(np.diff(cu_accepted) > 0, np.append(0, nodes)[cu_accepted[1:]], 0)
    return np.bincount(ends * V + bonus_ids, weights, minlength=num_nodes * V).reshape(num_nodes, V)


def trees_of(outcomes: Outcomes) -> list[tuple[DraftTree, float]]:
    """The draft trees with their probabilities; trees that differ in the order of siblings are one."""
    merged: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = defaultdict(float)
    for weight, branches in outcomes:
        token_ids, parents = [0], [-1]
        level = [(0, branches)]
        for parent, children in level:
            for token_id, _, below in sorted(children, key=lambda child: child[0]):
                level.append((len(parents), below))
                token_ids.append(token_id)
                parents.append(parent)
        merged[tuple(token_ids), tuple(parents)] += weight
    return [
        (DraftTree(np.array(token_ids, dtype=np.int32), np.array(parents, dtype=np.int32)), weight)
        for (token_ids, parents), weight in merged.items()
    ]


# --- rules that are biased unless the draft process is honest -----------------------------------------------------


def ratio_law(models: Models, outcomes: Outcomes, *, with_replacement: bool = False) -> tuple[dict[Text, float], float]:
    """Law of the text when the first step tests ``p / q`` child by child, and the mean number of accepted tokens.

    A rejected child leaves the residual ``max(p - q, 0)``; without replacement it also leaves q (Jeon et al. 2024;
    Chen et al. 2024, Sequoia), with replacement it does not (Miao et al. 2023, SpecInfer). On a chain both are the
    rule of Leviathan et al. 2023.
    """
    law: dict[Text, float] = defaultdict(float)
    mean_accepted = 0.0

    def descend(text: Text, branches: Branches, mass: float) -> None:
        nonlocal mean_accepted
        p, rejected = models.p[text], list[int]()
        for token_id, claimed, below in branches:
            q = claimed.copy()
            q[rejected] = 0
            if rejected and not with_replacement:
                q = normalised(q)
            accept = min(1.0, p[token_id] / q[token_id])
            descend((*text, token_id), below, mass * accept)
            mass *= 1 - accept
            if mass <= 1e-300:
                return
            p = normalised(np.maximum(p - q, 0))
            if not with_replacement:
                rejected.append(token_id)
        mean_accepted += mass * len(text)
        for token_id in range(V):
            add_continuations(law, (*text, token_id), mass * float(p[token_id]), models)

    for weight, branches in outcomes:
        descend((), branches, weight)
    return law, mean_accepted


def argmax_law(models: Models, outcomes: Outcomes) -> tuple[dict[Text, float], float]:
    """Law of the text when a chain is accepted while it equals the target's argmax, and p is sampled after it."""
    law: dict[Text, float] = defaultdict(float)
    mean_accepted = 0.0
    for weight, branches in outcomes:
        text: Text = ()
        while branches and branches[0][0] == models.p[text].argmax():
            text, branches = (*text, branches[0][0]), branches[0][2]
        mean_accepted += weight * len(text)
        for token_id in range(V):
            add_continuations(law, (*text, token_id), weight * float(models.p[text][token_id]), models)
    return law, mean_accepted


# --- draft processes: what a drafter may do, honest or not --------------------------------------------------------


def depth_left(models: Models, text: Text, most: int = 2) -> int:
    return min(most, models.num_tokens - len(text))


def chains(models: Models, text: Text) -> Iterator[tuple[float, Text]]:
    """Every chain drawn from q, with its probability."""
    for tokens in itertools.product(range(V), repeat=depth_left(models, text)):
        yield float(np.prod([models.q[(*text, *tokens[:i])][token] for i, token in enumerate(tokens)])), tokens


def as_chain(tokens: Text, laws: Iterable[Law]) -> Branches:
    branches: Branches = ()
    for token_id, law in reversed(list(zip(tokens, laws, strict=True))):
        branches = ((token_id, law, branches),)
    return branches


def claims(models: Models, text: Text, tokens: Text) -> list[Law]:
    """q at every token of a chain."""
    return [models.q[(*text, *tokens[:i])] for i in range(len(tokens))]


def chain_process(keep: Callable[[Models, Text, Text], int]) -> Process:
    """Draw a chain from q, then submit its first ``keep(models, text, tokens)`` tokens."""

    def process(models: Models, text: Text) -> Outcomes:
        for weight, tokens in chains(models, text):
            kept = tokens[: keep(models, text, tokens)]
            yield weight, as_chain(kept, claims(models, text, kept))

    return process


def first_failure(passes: Callable[[Models, Text, int], bool], *, keep_it: bool = False) -> Process:
    """Draw a chain from q and cut it at the first token that does not pass."""

    def keep(models: Models, text: Text, tokens: Text) -> int:
        for i, token_id in enumerate(tokens):
            if not passes(models, (*text, *tokens[:i]), token_id):
                return i + keep_it
        return len(tokens)

    return chain_process(keep)


def keep_if_last_is_confident(models: Models, text: Text, tokens: Text) -> int:
    if not tokens or models.q[(*text, *tokens[:-1])][tokens[-1]] >= 0.4:
        return len(tokens)
    return 0


def argmax_chain(models: Models, text: Text) -> Outcomes:
    """The likeliest chain, claimed to be a draw from q."""
    tokens: Text = ()
    for _ in range(depth_left(models, text, 3)):
        tokens += (int(models.q[(*text, *tokens)].argmax()),)
    yield 1.0, as_chain(tokens, claims(models, text, tokens))


def delta_chain(models: Models, text: Text) -> Outcomes:
    """The same chain, rightly claimed to be a point mass."""
    for weight, branches in argmax_chain(models, text):
        tokens = []
        while branches:
            tokens.append(branches[0][0])
            branches = branches[0][2]
        yield weight, as_chain(tuple(tokens), [np.eye(V)[token_id] for token_id in tokens])


def other_temperature(models: Models, text: Text) -> Outcomes:
    """A chain drawn from q that is claimed to come from a sharper law."""
    for weight, tokens in chains(models, text):
        yield weight, as_chain(tokens, [normalised(law**2) for law in claims(models, text, tokens)])


def top_two_tree(models: Models, text: Text) -> Outcomes:
    """Two levels of the two likeliest tokens, claimed to be draws from q."""

    def grow(text: Text, levels: int) -> Branches:
        law = models.q[text]
        best = np.argsort(-law)[:2].tolist()
        return tuple((token, law, grow((*text, token), levels - 1)) for token in best) if levels else ()

    yield 1.0, grow(text, depth_left(models, text))


def sampled_children(law: Law, count: int) -> Iterator[tuple[float, Text]]:
    """Ordered draws of ``count`` different tokens: a sample without replacement."""
    for tokens in itertools.permutations(range(V), count):
        weight, rest = 1.0, law.copy()
        for token_id in tokens:
            weight *= float(rest[token_id] / rest.sum())
            rest[token_id] = 0
        yield weight, tokens


def sampled_tree(fan_out: Callable[[Models, Text], int]) -> Process:
    """Two children, drawn without replacement, and below each as many as ``fan_out`` says before they are drawn."""

    def process(models: Models, text: Text) -> Outcomes:
        if depth_left(models, text) < 2:
            return [
                (weight, as_chain(tokens, [models.q[text]])) for weight, tokens in sampled_children(models.q[text], 1)
            ]
        outcomes = []
        for weight, pair in sampled_children(models.q[text], 2):
            below = [
                [
                    (w, tuple((token, models.q[(*text, parent)], ()) for token in tokens))
                    for w, tokens in sampled_children(models.q[(*text, parent)], fan_out(models, (*text, parent)))
                ]
                for parent in pair
            ]
            for (w0, below0), (w1, below1) in itertools.product(*below):
                law = models.q[text]
                outcomes.append((weight * w0 * w1, ((pair[0], law, below0), (pair[1], law, below1))))
        return outcomes

    return process


def reranked_tree(models: Models, text: Text) -> Outcomes:
    """A sampled tree of which only the three nodes of the best cumulative q are submitted (Li et al. 2024, EAGLE-2)."""
    for weight, branches in sampled_tree(lambda *_: 2)(models, text):
        values = []
        for i, (token_id, law, below) in enumerate(branches):
            values.append((float(law[token_id]), (i,)))
            values += [(float(law[token_id] * inner[child]), (i, j)) for j, (child, inner, _) in enumerate(below)]
        kept = {place for _, place in sorted(values, reverse=True)[:3]}
        yield (
            weight,
            tuple(
                (token_id, law, tuple(child for j, child in enumerate(below) if (i, j) in kept))
                for i, (token_id, law, below) in enumerate(branches)
                if (i,) in kept
            ),
        )


def most_confident_of_two(models: Models, text: Text) -> Outcomes:
    """Two drafters draw a token each; the one that its drafter gave more is submitted, with that drafter's law."""
    for first, second in itertools.product(range(V), repeat=2):
        weight = float(models.q[text][first] * models.q2[text][second])
        fused = [(models.q[text], first), (models.q2[text], second)]
        law, token_id = max(fused, key=lambda draft: draft[0][draft[1]])
        yield weight, ((token_id, law, ()),)


def two_draws(models: Models, text: Text) -> Outcomes:
    """Two independent draws from q; if they are equal, one child."""
    law = models.q[text]
    for pair in itertools.product(range(V), repeat=2):
        yield float(law[pair[0]] * law[pair[1]]), tuple((token, law, ()) for token in dict.fromkeys(pair))


def hostile_trees(models: Models, text: Text) -> Outcomes:
    """Five random trees of up to five nodes, which depend on the text."""
    rng = np.random.default_rng((7, len(text), *text))
    for _ in range(5):
        paths = {()}
        for _ in range(5):
            path = sorted(paths)[int(rng.integers(len(paths)))]
            if len(path) < depth_left(models, text, 4):
                paths.add((*path, int(rng.integers(V))))
        yield 0.2, subtree(paths, ())


def subtree(paths: set[Text], root: Text) -> Branches:
    below = sorted(path for path in paths if len(path) == len(root) + 1 and path[:-1] == root)
    return tuple((path[-1], np.eye(V)[path[-1]], subtree(paths, path)) for path in below)
