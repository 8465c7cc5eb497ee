"""Puts a fused drafter, its controller and the cost table of this machine together."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specdec.config import EngineConfig
from specdec.controller import BackoffController, FixedController
from specdec.controller_adaptive import AdaptiveController
from specdec.cost_measure import measure_costs
from specdec.cost_model import CostModel, cost_file
from specdec.drafters.fusion import FusedDrafter
from specdec.errors import ConfigError, LoadError
from specdec.protocols import Controller, Drafter, TargetModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

__all__ = ["controller_for", "known_costs", "measured_costs"]


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
