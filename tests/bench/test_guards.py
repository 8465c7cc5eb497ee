"""What the kernel, the GPU and the flags say about a run, each against a made-up machine."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from specdec.bench import energy, guards
from specdec.bench.guards import OthersLoad, guard
from specdec.bench.results_schema import at_load
from tests.bench.rows import row
from tests.bench.test_metrics import codes, result_of, rounds


def stat(file, busy_s: float) -> None:
    """The first line of /proc/stat: user and idle ticks."""
    ticks = int(busy_s * os.sysconf("SC_CLK_TCK"))
    file.write_text(f"cpu  {ticks} 0 0 999999 77 0 0 0 0 0\ncpu0 1 1 1 1\n")


def test_the_load_of_others_is_what_the_machine_did_less_what_we_did(tmp_path, monkeypatch):
    file, now, own = tmp_path / "stat", [50.0], [7.0]
    monkeypatch.setattr(guards, "perf_counter", lambda: now[0])
    monkeypatch.setattr(guards, "_own_s", lambda: own[0])
    stat(file, 100.0)
    watch = OthersLoad(stat=file)
    now[0], own[0] = 60.0, 17.0  # ten seconds, one core of them ours
    stat(file, 110.0)
    assert watch.cores() == pytest.approx(0.0, abs=0.01)
    stat(file, 140.0)
    assert watch.cores() == pytest.approx(3.0, abs=0.01)
    assert OthersLoad(stat=tmp_path / "none").cores() is None


def test_this_machine_has_a_load_that_can_be_read():
    others = OthersLoad().cores()
    if others is None:
        pytest.skip("there is no /proc/stat here")
    assert 0 <= others <= (os.cpu_count() or 1) * 2


def test_a_machine_that_others_use_is_flagged_and_an_unknown_one_is_not():
    clean = result_of(rounds("plain", 1.0))
    assert codes(clean, others=0.19, cores=2) == []
    assert codes(clean, others=0.21, cores=2) == ["busy-machine"]
    assert codes(clean, others=None) == []
    served = clean.model_copy(update={"mode": "serve"})
    assert codes(served, others=2.0) == []  # the server itself may be what is busy


def test_simulations_are_not_asked_for_rounds_or_quiet():
    one = result_of([row("ngram", num_steps=2)])
    assert codes(one, others=2.0) == ["few-runs", "busy-machine"]
    assert codes(one.model_copy(update={"mode": "simulate"}), others=2.0) == []


def test_the_bound_holds_at_every_load_of_a_sweep():
    """Twice the tokens per step cannot be three times as fast, however many requests share a step."""
    fast = {"num_steps": 5, "load": "x4", "start_s": 0.0}
    slow = {"load": "x4", "start_s": 0.0}
    rows = [*rounds(at_load("plain", "x4"), 1.0, **slow), *rounds(at_load("ngram", "x4"), 0.33, **fast)]
    flags = guard(result_of(rows), others=0.0, cores=2)
    assert [(flag.code, flag.severity) for flag in flags] == [("speedup-above-acceptance", "error")]
    possible = [*rounds(at_load("plain", "x4"), 1.0, **slow), *rounds(at_load("ngram", "x4"), 0.55, **fast)]
    assert codes(result_of(possible)) == []


def test_a_noisy_speedup_is_flagged_only_if_all_of_its_interval_is_impossible():
    """Two episodes, 1.5 and 4 times as fast with 2 tokens per step: the interval reaches into what is possible."""
    rows = [
        one
        for trace, seconds in (("a", 0.66), ("b", 0.25))
        for n in range(3)
        for one in (
            row("plain", round=n, trace=trace, call=ord(trace)),
            row("fast", round=n, trace=trace, call=ord(trace), seconds=seconds, num_steps=5),
        )
    ]
    result = result_of(rows)
    assert result.summary("fast").speedups["plain"].value > 2.0
    assert codes(result) == []


def test_joules_are_read_from_the_counter_and_are_nothing_where_none_is(monkeypatch):
    counter = iter([5_000, 5_000, 12_500])
    fake = ModuleType("pynvml")
    fake.NVMLError = RuntimeError
    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetHandleByIndex = lambda index: index
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(counter)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(energy.torch, "cuda", SimpleNamespace(is_available=lambda: True, current_device=lambda: 0))
    meter = energy.EnergyMeter()
    assert meter.is_available
    meter.start()
    assert meter.stop() == 7.5  # millijoules of the counter to joules

    def absent(handle):
        raise RuntimeError("not supported")

    fake.nvmlDeviceGetTotalEnergyConsumption = absent
    assert not energy.EnergyMeter().is_available
    monkeypatch.setattr(energy.torch, "cuda", SimpleNamespace(is_available=lambda: False))
    silent = energy.EnergyMeter()
    silent.start()
    assert (silent.is_available, silent.stop()) == (False, 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_no_energy_is_claimed():
    assert not energy.EnergyMeter().is_available
