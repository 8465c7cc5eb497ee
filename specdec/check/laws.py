"""The engine's law against the model's own, by two samples: a test that does not need the keyed noise to be right.

The other side is as plain as can be: ordinary forwards over whole prefixes, transformers' processors, and torch's
multinomial with a generator of its own. It shares no code with the engine below the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from specdec.check.hostile import HostileDrafter
from specdec.check.report import TwoSample
from specdec.check.two_sample import POWER, SIGNIFICANCE, two_sample_test
from specdec.placement import device_of
from specdec.types import IntArray, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.check.lab import Lab
    from specdec.check.settings import Setting
    from specdec.engine import Engine

__all__ = ["LENGTH", "compare_laws", "ordinary_sample"]

LENGTH: Final = 3  # tokens per continuation: a draft of two, and the bonus token after it
_BATCH_SIZE: Final = 32
_NUM_LIKELY: Final = 64  # continuations that the drafter is told
_FIRST_SEED: Final = 1 << 32  # away from the seeds of the other tests

Continuation = tuple[int, ...]


def compare_laws(
    lab: Lab,
    setting: Setting,
    prompt_ids: IntArray,
    *,
    num_samples: int,
    knows_likely: bool = True,
    tamper: Callable[[Engine], None] | None = None,
) -> TwoSample:
    """Sample continuations of one prompt from the speculating engine and from an ordinary sampler, and compare.

    The drafter is hostile; as it knows the likely continuations, drafts of every length are accepted.

    Args:
        lab: the model.
        setting: the law.
        prompt_ids: [P] int32.
        num_samples: of each side.
        knows_likely: False: all drafts are random tokens.
        tamper: breaks the engine before it runs.
    """
    rng = torch.Generator().manual_seed(num_samples)
    ordinary = ordinary_sample(lab.model, setting, prompt_ids, num_samples=num_samples, length=LENGTH, rng=rng)

    def enough(input_ids: Tensor, scores: Tensor | None) -> bool:
        return input_ids.shape[1] >= len(prompt_ids) + LENGTH

    likely = [list(ids) for ids, _ in Counter(ordinary).most_common(_NUM_LIKELY if knows_likely else 0)]
    room = min(LENGTH + lab.plan.budget, lab.plan.max_length - len(prompt_ids))
    requests = [
        Request(
            f"sample {index}",
            prompt_ids,
            replace(
                # With LENGTH as the limit, the engine would cut the drafts: the last token is never worth drafting.
                setting.sampling(seed=_FIRST_SEED + index, max_new_tokens=room, stop_token_ids=()),
                stopping_criteria=(enough,),
            ),
        )
        for index in range(num_samples)
    ]
    vocab_size = int(lab.model.config.get_text_config().vocab_size)
    drafter = HostileDrafter({request.request_id: likely for request in requests}, vocab_size)
    outputs = lab.decode(requests, drafter, batch_size=_BATCH_SIZE, tamper=tamper)
    drawn = [tuple(ids) for ids in outputs.token_ids.values()]
    test = two_sample_test(drawn, ordinary)
    return TwoSample(
        setting=setting.name,
        num_samples=num_samples,
        length=LENGTH,
        num_cells=test.num_cells,
        total_variation=test.total_variation,
        p_value=test.p_value,
        significance=SIGNIFICANCE,
        detectable_tv=test.detectable_tv,
        power=POWER,
        acceptance_length=outputs.acceptance_length or 1.0,
    )


@torch.inference_mode()
def ordinary_sample(
    model: PreTrainedModel,
    setting: Setting,
    prompt_ids: IntArray,
    *,
    num_samples: int,
    length: int,
    rng: torch.Generator,
) -> list[Continuation]:
    """[num_samples] continuations of ``length`` tokens, drawn without the engine; ends of sequence do not end them.

    Equal prefixes share a forward, so the cost is one row per *different* prefix.
    """
    counts: Counter[Continuation] = Counter({(): num_samples})
    prompt = torch.from_numpy(prompt_ids.astype(np.int64))
    for _ in range(length):
        grown: Counter[Continuation] = Counter()
        prefixes = list(counts)
        for start in range(0, len(prefixes), _BATCH_SIZE):
            batch = prefixes[start : start + _BATCH_SIZE]
            probs = _next_probs(model, setting, prompt, batch)
            for continuation, row in zip(batch, probs, strict=True):
                ids = torch.multinomial(row, counts[continuation], replacement=True, generator=rng)
                for token_id in ids.tolist():
                    grown[*continuation, token_id] += 1
        counts = grown
    return list(counts.elements())


def _next_probs(
    model: PreTrainedModel, setting: Setting, prompt: Tensor, continuations: Sequence[Continuation]
) -> Tensor:
    """[R, V] float64 on the CPU: the law of the next token after the prompt and each continuation."""
    tails = torch.tensor(continuations, dtype=torch.int64).reshape(len(continuations), -1)
    input_ids = torch.cat([prompt.expand(len(continuations), -1), tails], dim=1).to(device_of(model))
    logits = model(input_ids=input_ids, use_cache=False).logits[:, -1]
    return torch.softmax(setting.scores(input_ids, logits).double(), dim=-1).cpu()
