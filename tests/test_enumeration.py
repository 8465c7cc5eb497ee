"""Which rules keep the target's law: exactly, by enumeration of every draft and every draw, without statistics.

One random language model proves little (a rule can be right on it by luck, or never accept anything), so every rule is
judged on many, and every judgement demands that tokens were accepted.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from statistics import median

import numpy as np
import pytest

from specdec.types import DraftTree
from specdec.verifier.match import match_walk
from tests import enumeration as e

EXACT = 1e-12  # rounding of some thousand float64 products and sums
BIASED = 1e-3

# Lossless with the ratio rule too: drawn from the law that they claim, and what is submitted does not depend on draws
# of its own or later positions.
HONEST: dict[str, e.Process] = {
    "a chain drawn from q": e.chain_process(lambda models, text, tokens: len(tokens)),
    "stop after a token of low q, which is kept": e.first_failure(
        lambda models, text, token_id: models.q[text][token_id] >= 0.4, keep_it=True
    ),
    "stop before a draw from a flat q": e.first_failure(lambda models, text, _: models.q[text].max() >= 0.45),
    "the likeliest chain as a point mass": e.delta_chain,
    "a tree drawn without replacement": e.sampled_tree(lambda *_: 2),
    "a tree whose shape follows realised tokens": e.sampled_tree(lambda models, text: 1 + text[-1] % 2),
}
# Biased with the ratio rule.
DISHONEST: dict[str, e.Process] = {
    "drop a token for its own low q": e.first_failure(lambda models, text, token_id: models.q[text][token_id] >= 0.4),
    "drop a token for a low p": e.first_failure(lambda models, text, token_id: models.p[text][token_id] >= 0.2),
    "admit tokens for a later token's q": e.chain_process(e.keep_if_last_is_confident),
    "the likeliest chain, claimed to be drawn": e.argmax_chain,
    "the two likeliest children, claimed to be drawn": e.top_two_tree,
    "a claimed q of another temperature": e.other_temperature,
    "sampled children reranked by realised q": e.reranked_tree,
    "the more confident of two drafters": e.most_confident_of_two,
}
OTHERS: dict[str, e.Process] = {"two equal draws are one child": e.two_draws, "hostile trees": e.hostile_trees}


@pytest.mark.parametrize("process", [*HONEST, *DISHONEST, *OTHERS])
def test_match_keeps_the_law_whatever_is_drafted(process: str) -> None:
    num_telling = 0
    for seed in range(15):
        models = e.random_models(seed, num_tokens=4 if seed == 0 else 3)
        law, mean_accepted = e.match_law(models, (HONEST | DISHONEST | OTHERS)[process])
        assert sum(law.values()) == pytest.approx(1, abs=EXACT)
        assert e.total_variation(law, e.target_law(models)) < EXACT
        num_telling += mean_accepted > 0.01
    assert num_telling >= 10, "a model on which nothing was accepted shows nothing"


@pytest.mark.parametrize("process", HONEST)
def test_the_ratio_rule_keeps_the_law_of_honest_drafts(process: str) -> None:
    num_telling = 0
    for seed in range(15):
        models = e.random_models(seed, num_tokens=3)
        law, mean_accepted = e.ratio_law(models, HONEST[process](models, ()))
        assert e.total_variation(law, e.target_law(models)) < EXACT
        num_telling += mean_accepted > 0.01
    assert num_telling >= 10


@pytest.mark.parametrize("process", DISHONEST)
def test_the_ratio_rule_is_biased_on_drafts_that_break_its_premises(process: str) -> None:
    distances = []
    for seed in range(30):
        models = e.random_models(seed, num_tokens=3)
        law, mean_accepted = e.ratio_law(models, DISHONEST[process](models, ()))
        assert sum(law.values()) == pytest.approx(1, abs=EXACT)  # a law, only not the target's
        distances.append(e.total_variation(law, e.target_law(models)) if mean_accepted > 0 else 0)
    assert median(distances) > 10 * BIASED
    assert sum(distance > BIASED for distance in distances) >= 25


def test_accepting_the_argmax_is_biased_when_sampling() -> None:
    distances = []
    for seed in range(30):
        models = e.random_models(seed, num_tokens=3)
        law, mean_accepted = e.argmax_law(models, e.delta_chain(models, ()))
        distances.append(e.total_variation(law, e.target_law(models)) if mean_accepted > 0 else 0)
    assert sum(distance > BIASED for distance in distances) >= 20  # elsewhere the draft is not the argmax: no harm


def test_dropping_equal_draws_is_biased_with_replacement_if_rarely() -> None:
    distances = []
    for seed in range(30):
        models = e.random_models(seed, num_tokens=2)
        law, _ = e.ratio_law(models, e.two_draws(models, ()), with_replacement=True)
        distances.append(e.total_variation(law, e.target_law(models)))
    assert max(distances) > BIASED  # median 0: on one model alone the mistake would not show
    assert median(distances) < BIASED


def test_match_keeps_the_law_of_a_drafter_that_reads_the_targets_own_noise() -> None:
    for seed in range(3):
        models = e.random_models(seed, num_tokens=3)
        law: dict[e.Text, float] = defaultdict(float)
        num_accepted = 0
        for weight, noise in noise_cells(models):
            text: e.Text = ()
            while len(text) < 3:
                emitted = shared_noise_step(models, text, noise)
                num_accepted += len(emitted) - 1
                text += emitted
            law[text[:3]] += weight
        assert e.total_variation(law, e.target_law(models)) < EXACT
        assert num_accepted > 100


def noise_cells(models: e.Models) -> list[tuple[float, tuple[float, ...]]]:
    """One uniform per position, as (probability, midpoints): all that lie in one cell draw the same tokens anywhere."""
    per_position = []
    for position in range(3):
        edges = {0.0, 1.0}
        for text in itertools.product(range(e.V), repeat=position):
            edges |= {float(edge) for table in (models.p, models.q) for edge in np.cumsum(table[text])[:-1]}
        pairs = list(itertools.pairwise(sorted(edges)))
        per_position.append([(high - low, (low + high) / 2) for low, high in pairs])
    return [
        (float(np.prod([width for width, _ in cells])), tuple(middle for _, middle in cells))
        for cells in itertools.product(*per_position)
    ]


def drawn(law: e.Law, noise: float) -> int:
    return min(int(np.searchsorted(np.cumsum(law), noise)), e.V - 1)


def shared_noise_step(models: e.Models, text: e.Text, noise: tuple[float, ...]) -> e.Text:
    """One step: the drafter draws a chain from q with the noise that the target will use; match decides."""
    draft: e.Text = ()
    for position in range(len(text), 3):
        draft += (drawn(models.q[text + draft], noise[position]),)
    draft = draft[: 1 + (noise[-1] > 0.5)]  # its length depends on noise that no draw of this step may have used
    tree = DraftTree.chain(0, draft)
    targets = [drawn(models.p[text + draft[:i]], ([*noise, 0.5])[len(text) + i]) for i in range(len(tree))]
    cu_nodes = np.array([0, len(tree)], dtype=np.int32)
    nodes, _, bonus_ids = match_walk(np.array(targets, dtype=np.int32), tree.token_ids, tree.parents, cu_nodes)
    return (*(int(tree.token_ids[node]) for node in nodes), int(bonus_ids[0]))
