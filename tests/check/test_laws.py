"""The ordinary sampler draws from the model's law, and both sides of the comparison see the same law."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from specdec.check.lab import Lab, Plan
from specdec.check.laws import LENGTH, compare_laws, ordinary_sample
from specdec.check.prompts import Prompt
from specdec.check.settings import LAWS, Setting
from specdec.routes import choose_route
from tests.check import broken
from tests.tiny_models import tiny_llama

PROMPT = np.array([5, 9, 17, 4], dtype=np.int32)
PLAN = Plan(
    [Prompt("p", PROMPT)], stop_token_ids=(), max_new_tokens=8, max_length=128, budget=6, batch_size=4, num_seeds=1
)


def test_the_ordinary_sampler_draws_from_the_law_of_whole_prefixes():
    model, setting = tiny_llama(), Setting("top-k", temperature=0.5, top_k=3)
    model.lm_head.weight.data *= 20
    rng = torch.Generator().manual_seed(0)
    drawn = ordinary_sample(model, setting, PROMPT, num_samples=4000, length=2, rng=rng)
    assert len(drawn) == 4000
    first, count = Counter(ids[0] for ids in drawn).most_common(1)[0]
    with torch.no_grad():
        scores = model(torch.from_numpy(PROMPT.astype(np.int64))[None]).logits[0, -1] / 0.5
        after = model(torch.tensor([[*PROMPT.tolist(), first]])).logits[0, -1] / 0.5
    assert abs(count / 4000 - float(scores.topk(3).values.softmax(0)[0])) < 0.04  # 5 deviations of 0.008
    law = dict(zip(after.topk(3).indices.tolist(), after.topk(3).values.softmax(0).tolist(), strict=True))
    seconds = Counter(ids[1] for ids in drawn if ids[0] == first)
    assert set(seconds) <= set(law)
    assert all(abs(seconds[token] / count - p) < 0.06 for token, p in law.items())


def test_a_sound_engine_has_the_law_of_the_ordinary_sampler_and_speculates_while_it_shows_it():
    model = tiny_llama()
    model.lm_head.weight.data *= 20
    test = compare_laws(Lab(model, PLAN, choose_route(model, max_length=128)), LAWS[1], PROMPT, num_samples=200)
    assert not test.is_bug
    assert test.length == LENGTH
    assert test.acceptance_length > 1.1
    assert test.detectable_tv is not None
    assert test.detectable_tv < 0.4


def test_wrong_tokens_are_found_in_the_law():
    model = tiny_llama()
    lab = Lab(model, PLAN, choose_route(model, max_length=128))
    test = compare_laws(lab, LAWS[1], PROMPT, num_samples=200, tamper=broken.accept_a_wrong_child)
    assert test.is_bug
