"""What every test gets: one thread, no network, reproducible Hypothesis, and a reason when there is no GPU."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

# Set before anything imports torch, numba or transformers, and inherited by the processes that tests start.
# The models are tiny: one thread is fastest, and xdist has one worker per core already.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # tests assert on what specdec says

# `ci` takes its examples from the test's text and from the constants of the modules that happen to be loaded, never
# from the clock; `HYPOTHESIS_PROFILE=explore` looks for new ones.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _wants_gpu(config: pytest.Config) -> bool:
    return "gpu" in str(config.getoption("-m")).replace("not gpu", "")


def pytest_configure(config: pytest.Config) -> None:
    """Kernels run in numpy unless GPU tests were asked for; the switch is read when their module is first imported."""
    if not _wants_gpu(config):
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU; torch is imported only if such a test was asked for."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or not _wants_gpu(config):
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(autouse=True)
def unhurried_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No draft ends because of measured times (``min_gain=auto``): what a test counts is not the machine's pace."""
    if (module := sys.modules.get("specdec.drafters.draft_costs")) is not None:
        monkeypatch.setattr(module.DraftCosts, "costs", None)


@pytest.fixture
def fixed_order_products():
    """Interpreted products sum every element in one order, as a GPU's matrix units do."""
    from specdec.kernels.launch import interpreted_in_order

    with interpreted_in_order():
        yield
