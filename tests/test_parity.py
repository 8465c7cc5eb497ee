"""The guarantee over real architectures: the same tokens with any drafter, greedy ones those of ``model.generate``.

Every model is served on the path that it is routed to. Requests of different length come in while others run, prompts
are cut into pieces that share steps with decoding, and one run has a KV pool too small for all, so that requests are
preempted and recomputed. All in float32, token for token, without tolerance.
"""

from __future__ import annotations

import pytest
import torch

from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.routes import choose_route
from specdec.toy import OracleDrafter, RandomTreeDrafter
from specdec.types import SamplingParams
from tests.architectures import ARCHITECTURES, EXPECTED_ROUTES, FAST, VOCAB_SIZE
from tests.greedy import generate, prompts
from tests.serving import MAX_LENGTH, serve, target_for, texts

NUM_NEW = 12
BUDGET = 9
LENGTHS = (3, 9, 14, 21, 6)
SERVED = [name for name, route in EXPECTED_ROUTES.items() if route != "refused"]
EACH = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SERVED]
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def oracle(outputs, target):
    """Drafts the true text for three tokens, then a wrong one; in trees, wrong siblings come first on each level."""
    told = {str(index): ids for index, ids in enumerate(outputs)}
    return OracleDrafter(told, VOCAB_SIZE, num_wrong_siblings=2 if target.supports_trees else 0, wrong_from=4)


def drafters(outputs, target):
    return {
        "ngram": NgramDrafter(min_value=0),
        "random tree": RandomTreeDrafter(VOCAB_SIZE),
        "oracle": oracle(outputs, target),
    }


def route_name(route):
    return route.kind if route.can_draft else f"{route.kind} without drafts"


@EACH
def test_greedy_text_is_that_of_generate(name):
    model = ARCHITECTURES[name]()
    route = choose_route(model, max_length=MAX_LENGTH)
    assert route_name(route) == EXPECTED_ROUTES[name], route.reasons
    asked = prompts(VOCAB_SIZE, LENGTHS)
    expected = [generate(model, prompt, NUM_NEW) for prompt in asked]
    greedy = [SamplingParams(max_new_tokens=NUM_NEW)] * len(asked)
    target = target_for(model, route)
    assert texts(serve(target, NoDrafter(), asked[1:2], greedy[:1], budget=0)) == expected[1:2], "alone"
    assert texts(serve(target, NoDrafter(), asked, greedy, budget=0, num_late=2)) == expected, "in a batch"
    for drafter_name, drafter in drafters(expected, target).items():
        states = serve(target, drafter, asked, greedy, budget=BUDGET, num_late=2)
        assert texts(states) == expected, drafter_name
    assert all(state.num_accepted for state in states) or not route.can_draft, "the oracle is right for three tokens"
    # Three short requests that outgrow a pool for one and a half of them.
    some = [0, 1, 4]
    told = [expected[i] for i in some]
    small = target_for(model, route, kv_tokens=32)
    states = serve(small, oracle(told, small), [asked[i] for i in some], greedy[:3], budget=4)
    assert texts(states) == told, "in a small pool"
    if name in ("llama", "qwen3_next", "mamba"):  # windows hold little, and a plain target nothing
        assert any(state.num_preemptions for state in states)


@EACH
def test_sampled_text_depends_on_no_drafter_and_no_neighbour(name):
    model = ARCHITECTURES[name]()
    target = target_for(model, choose_route(model, max_length=MAX_LENGTH))
    asked = prompts(VOCAB_SIZE, LENGTHS, seed=2)
    sampling = [
        SamplingParams(max_new_tokens=NUM_NEW, temperature=0.8, top_k=20, seed=5 + index) for index in range(len(asked))
    ]
    expected = []
    for prompt, how in zip(asked, sampling, strict=True):
        expected += texts(serve(target, NoDrafter(), [prompt], [how], budget=0))
    assert texts(serve(target, NoDrafter(), asked, sampling, budget=0, num_late=2)) == expected, "in a batch"
    for drafter_name, drafter in drafters(expected, target).items():
        states = serve(target, drafter, asked, sampling, budget=BUDGET, num_late=2)
        assert texts(states) == expected, drafter_name


@pytest.mark.parametrize("name", [name for name, route in EXPECTED_ROUTES.items() if route == "refused"])
def test_what_cannot_be_served_is_refused_with_a_reason(name):
    route = choose_route(ARCHITECTURES[name](), max_length=MAX_LENGTH)
    assert route.kind == "refused"
    assert route.reasons


def test_every_architecture_has_an_expected_route():
    assert set(ARCHITECTURES) == set(EXPECTED_ROUTES)
    assert set(FAST) <= set(EXPECTED_ROUTES)
    assert sum(EXPECTED_ROUTES[name] == "tree" for name in FAST) >= 45
