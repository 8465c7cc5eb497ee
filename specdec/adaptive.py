"""Puts a fused drafter, its controller and the cost table of this machine together."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specdec.beside import beside_for
from specdec.config import EngineConfig
from specdec.controller import BackoffController, FixedController
from specdec.controller_adaptive import AdaptiveController
from specdec.cost_measure import measure_costs
from specdec.cost_model import CostModel, cost_file
from specdec.drafters.fusion import FusedDrafter
from specdec.drafters.lm import LmDrafter
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import ConfigError, LoadError, UnsupportedError
from specdec.overlap import StepOverlap
from specdec.overlap_costs import AutoOverlap, FixedOverlap
from specdec.placement import device_of
from specdec.protocols import Controller, Drafter, TargetModel, Verifier
from specdec.ranks import is_spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

__all__ = ["controller_for", "known_costs", "measured_costs", "overlap_for"]


def controller_for(
    drafters: Sequence[Drafter], budget: int | None = None, *, costs: CostModel | None = None
) -> Controller:
    """The controller that an engine takes by itself.

    Args:
        drafters: those of the engine.
        budget: most draft tokens per request and step; None: adaptive for fused drafters, which state calibrated
            values, and by what was accepted for others.
        costs: what is known of this machine; fused drafters are given it.
    """
    if budget is not None:
        return FixedController(budget)
    fused = [drafter for drafter in drafters if isinstance(drafter, FusedDrafter)]
    if not fused:
        return BackoffController()
    shared = costs or fused[0].costs
    for drafter in fused:
        drafter.costs = shared
    return AdaptiveController(shared)


def known_costs(
    controller: Controller, model: PreTrainedModel, target: TargetModel, config: EngineConfig, *, is_packed: bool
) -> list[Callable[[], None]]:
    """Give a controller that asks for costs the table of this machine, if the engine is to measure.

    Returns:
        What is to be done when the engine closes: the table is kept with what was learned.
    """
    known = getattr(controller, "costs", None)
    if config.costs == "learn" or not isinstance(known, CostModel):
        return []
    costs, path = measured_costs(model, target, (config.numerics, "packed" if is_packed else "dense"))
    known.take(costs)
    return [lambda: known.save(path)]


def measured_costs(model: PreTrainedModel, target: TargetModel, variant: Sequence[object]) -> tuple[CostModel, Path]:
    """The cost table of a model on this machine: from the last run, or measured now in a few seconds.

    Args:
        model: whose name, device and dtype say which table it is.
        target: what is measured; idle.
        variant: what else the times depend on.

    Returns:
        The table, empty where the target has no room to be measured in, and the file where it is kept.
    """
    config: Any = model.config
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine()
    size = sum(parameter.numel() for parameter in model.parameters())
    name = Path(str(getattr(config, "_name_or_path", "") or type(model).__name__)).name
    dtype = str(model.dtype).removeprefix("torch.")
    path = cost_file([name, size, device, torch.get_num_threads(), dtype, *variant])
    try:
        return CostModel.load(path), path
    except LoadError:
        try:
            costs = measure_costs(target)
        except ConfigError as error:
            logger.warning("what steps cost is learned as they come: %s", error)
            return CostModel(), path
        logger.info("measured what a step of %s costs: %.2f ms for one token", name, costs.step_ms(1, 128, 1))
        return costs, path


def overlap_for(
    model: PreTrainedModel, drafter: Drafter, controller: Controller, verifier: Verifier, config: EngineConfig
) -> StepOverlap | None:
    """What lets drafting and verification overlap, as the configuration wants it; None: nothing does.

    Raises:
        UnsupportedError: it was asked for by name and cannot be, or a green context was and there is none.
    """
    mode, device = config.overlap, device_of(model)
    if mode == "off" or isinstance(drafter, NoDrafter):
        return None
    obstacle = None
    if verifier.draws is not None:
        obstacle = "drafts of another step are no draws for a rejection rule: use the match rule"
    elif is_spread(model):
        obstacle = "the model's ranks would have to agree on it at every step"
    may_run_beside = device.type == "cuda" or _drafts_apart(drafter, model)
    if obstacle is None and mode == "halves" and not may_run_beside:
        obstacle = f"on a CPU {type(drafter).__name__} may run modules of the target, which is busy with the other half"
    if obstacle is not None:
        if mode == "auto":
            return None
        raise UnsupportedError(f'overlap="{mode}" is impossible here: {obstacle}')
    policy: AutoOverlap | FixedOverlap
    if mode == "auto":
        # Two threads need one interpreter: on a CPU the forward hides none of a draft.
        policy = AutoOverlap(getattr(controller, "costs", None), hidden=1.0 if device.type == "cuda" else 0.0)
    else:
        policy = FixedOverlap(mode)
    beside = beside_for(device, num_sms=config.overlap_sms)
    return StepOverlap(policy, beside, looks_ahead=may_run_beside and mode != "auto")


def _drafts_apart(drafter: Drafter, model: PreTrainedModel) -> bool:
    """True if a drafter runs nothing of the target, so that a thread of its own may."""
    parts = getattr(drafter, "drafters", None)  # of one that asks several
    if isinstance(parts, tuple):
        return all(_drafts_apart(part, model) for part in parts)
    if isinstance(drafter, LmDrafter):
        return drafter.model.hf_model is not model
    return isinstance(drafter, NgramDrafter | SuffixDrafter | LookaheadDrafter | RecyclingDrafter)
