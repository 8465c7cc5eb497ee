"""Weights change while requests run: no emitted token does; what does not fit is refused; bad versions go back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.build import build_engine, load_drafter
from specdec.errors import LoadError
from specdec.online_training.guard import Cusum, GuardOptions, RollbackLimit, Trial, share_of, tell_apart
from specdec.online_training.guardian import Guardian
from specdec.online_training.registry import Manifest, Registry
from specdec.online_training.swap import VersionedDrafter
from specdec.online_training.version_weights import read_weights
from specdec.types import Request, SamplingParams
from tests.drafters.eagle_checkpoints import eagle_target, write
from tests.online_training.versions import MOOD, Service, acceptance_length, finish, publish, versioned

OPTIONS = GuardOptions(canary_share=0.5, min_requests=20, max_requests=60, shadow_share=0.2, min_seconds=0.0)


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("heads")
    folders = [write("specforge", root / str(seed), seed=seed) for seed in (0, 1, 2)]
    for folder in folders[1:]:  # versions of one drafter know the same tokens
        weights = load_file(folder / "model.safetensors")
        weights |= {name: load_file(folders[0] / "model.safetensors")[name] for name in ("d2t", "t2d")}
        save_file(weights, folder / "model.safetensors")
    return folders


class SwapEvery:
    """Installs the next version after every k rounds, from within the engine's loop."""

    def __init__(self, drafter: VersionedDrafter, weights: list[Any], every: int) -> None:
        self._drafter, self._weights, self._every = drafter, weights, every
        self.num_rounds = 0
        self.versions: set[int] = set()

    def observe(self, events: Any) -> None:
        self.num_rounds += 1
        self.versions |= {self._drafter.version_of(event.state.request_id) for event in events}
        if self.num_rounds % self._every == 0:
            number = self.num_rounds // self._every
            self._drafter.install("current", 100 + number, self._weights[number % len(self._weights)])


@pytest.mark.parametrize("law", [{}, {"temperature": 0.9, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("at_once", "every"), [(True, 1), (False, 3)], ids=["in place", "kept apart"])
def test_swapping_every_k_rounds_changes_no_token(
    target: Any, heads: list[Path], law: dict[str, Any], at_once: bool, every: int
) -> None:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 250, size).astype(np.int32) for size in (5, 17, 9, 30, 3, 12)]
    asked = [
        Request(f"r{i}", prompt, SamplingParams(max_new_tokens=20, seed=i, **law)) for i, prompt in enumerate(prompts)
    ]
    with build_engine(target, "none", max_batch_size=2) as engine:
        plain = [state.output_ids.tolist() for state in finish(engine.generate(asked), asked)]
    weights = [read_weights("eagle", folder) for folder in heads]
    drafter = VersionedDrafter(
        lambda: load_drafter(f"eagle:{heads[0]}?top_k=2&depth=3&probe=0", target),  # type: ignore[arg-type,return-value]
        1, weights[0], at_once=at_once,
    )  # fmt: skip
    swaps = SwapEvery(drafter, weights, every)
    with build_engine(target, drafter, budget=5, max_batch_size=2, observers=[swaps]) as engine:
        states = []
        for start in range(0, len(asked), 2):  # a request takes its version when it begins
            states += finish(engine.generate(asked[start : start + 2]), asked[start : start + 2])
    assert [state.output_ids.tolist() for state in states] == plain
    assert sum(state.num_drafted for state in states) > 50
    assert drafter.num_swaps >= 3
    assert len(swaps.versions) >= 3


def test_weights_are_copied_into_the_tensors_in_service(target: Any, heads: list[Path]) -> None:
    made = load_drafter(f"eagle:{heads[0]}?probe=0", target)
    drafter = VersionedDrafter(lambda: made, 1, read_weights("eagle", heads[0]), at_once=True)  # type: ignore[arg-type,return-value]
    before = {name: weight.data_ptr() for name, weight in made.named_weights.items()}  # type: ignore[attr-defined]
    drafter.install("current", 2, read_weights("eagle", heads[1]))
    drafter.propose([], [])
    assert drafter.version_in("current") == 2
    for name, weight in made.named_weights.items():  # type: ignore[attr-defined]
        assert weight.data_ptr() == before[name]
        assert torch.equal(weight, read_weights("eagle", heads[1])[name])


@pytest.mark.parametrize("damage", ["nan", "shape", "name", "tokens", "corrupt"])
def test_unfit_weights_are_refused_and_the_present_ones_stay(
    target: Any, heads: list[Path], tmp_path: Path, damage: str
) -> None:
    registry = Registry(tmp_path / "registry")

    def export(folder: Path, *, is_sound: bool) -> None:
        folder.mkdir()
        weights = load_file(heads[0] / "model.safetensors")
        if not is_sound:
            if damage == "nan":
                weights["fc.weight"][0, 0] = math.nan
            elif damage == "shape":
                weights["fc.weight"] = weights["fc.weight"][:, :-1].contiguous()
            elif damage == "name":
                weights["other.weight"] = weights["fc.weight"].clone()
            elif damage == "tokens":
                weights["d2t"] = weights["d2t"] + 1
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text((heads[0] / "config.json").read_text())

    for is_sound in (True, False):
        registry.publish(
            lambda folder, ok=is_sound: export(folder, is_sound=ok),  # type: ignore[misc]
            Manifest(version=0, parent=0, kind="eagle", target="t"),
        )
    registry.promote(1, "first")
    first = read_weights("eagle", registry.path(1))
    drafter = VersionedDrafter(lambda: load_drafter(f"eagle:{heads[0]}?probe=0", target), 1, first, at_once=True)  # type: ignore[arg-type,return-value]
    guardian = Guardian(registry, drafter, options=OPTIONS, is_automatic=False)
    registry.promote(2, "by hand")
    if damage == "corrupt":
        file = registry.path(2) / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    before = {name: weight.clone() for name, weight in drafter._lanes[0].drafter.named_weights.items()}
    guardian.step()
    drafter.propose([], [])
    assert drafter.version_in("current") == 1
    assert all(torch.equal(weight, before[name]) for name, weight in drafter._lanes[0].drafter.named_weights.items())
    state = registry.state()
    assert state.current == 1
    assert "refused" in state.marks[2]


def guarded(tmp_path: Path, *depths: float, **options: Any) -> tuple[Registry, VersionedDrafter, Guardian, Service]:
    registry = Registry(tmp_path / "registry")
    for depth in depths:
        publish(registry, depth)
    registry.promote(1, "first")
    drafter = versioned(registry, 1)
    guardian = Guardian(registry, drafter, kind="lm", options=OPTIONS, **options)
    return registry, drafter, guardian, Service(drafter)


def run(guardian: Guardian, service: Service, count: int) -> list[float]:
    """Serve requests, letting the guardian look after each; acceptance length by request."""
    lengths = []
    for _ in range(count):
        lengths.append(acceptance_length(service.serve(1)))
        guardian.step()
    return lengths


def test_a_better_version_is_tried_on_a_share_and_promoted(tmp_path: Path) -> None:
    registry, drafter, guardian, service = guarded(tmp_path, 2, 4)
    run(guardian, service, 30)
    assert registry.state().canary == 2
    assert drafter.version_in("canary") == 2
    run(guardian, service, 60)
    assert registry.state().current == 2
    assert drafter.version_in("current") == 2
    assert acceptance_length(service.serve(20)) > 3.5
    assert drafter.counts[2].num_rounds > 0


def test_a_worse_version_is_rejected_and_served_to_no_more_than_its_share(tmp_path: Path) -> None:
    registry, drafter, guardian, service = guarded(tmp_path, 3, 1)
    run(guardian, service, 120)
    state = registry.state()
    assert (state.current, state.canary) == (1, 0)
    assert "requests" in state.marks[2]
    assert drafter.version_in("canary") == 0


def test_an_injected_random_drafter_is_rolled_back_and_quality_returns(tmp_path: Path) -> None:
    registry, drafter, guardian, service = guarded(tmp_path, 3, 3.4, 0, is_automatic=False)
    run(guardian, service, 40)
    registry.promote(2, "a sound successor")
    before = np.mean(run(guardian, service, 60))
    registry.promote(3, "injected, by hand, past every trial")
    lengths = run(guardian, service, 60)
    after_swap = lengths.index(min(lengths))
    assert min(lengths) < 1.1 < before  # it did serve
    assert registry.state().current == 2
    assert "the baseline's" in registry.state().marks[3]
    bad = [length for length in lengths if length < 1.1]
    assert len(bad) <= 15  # requests; about 12 rounds each
    assert after_swap < 5
    assert np.mean(lengths[-20:]) > 0.95 * before
    assert drafter.version_in("current") == 2


def test_a_change_of_traffic_is_no_reason_to_roll_back(tmp_path: Path) -> None:
    registry, _, guardian, service = guarded(tmp_path, 3, 4, is_automatic=False)
    run(guardian, service, 40)
    registry.promote(2, "a sound successor")
    run(guardian, service, 60)
    MOOD["luck"] = 1
    try:
        lengths = run(guardian, service, 80)
    finally:
        MOOD["luck"] = 0
    assert np.mean(lengths) < 2.0  # it fell, and so did the baseline
    assert registry.state().current == 2
    assert registry.state().marks == {}


def test_versions_wait_for_each_other(tmp_path: Path) -> None:
    now = [0.0]
    registry, drafter, guardian, service = guarded(tmp_path, 2, 4, clock=lambda: now[0])
    guardian.options = guardian._limit._options = GuardOptions(
        canary_share=0.5, min_requests=20, max_requests=60, min_seconds=600.0
    )
    run(guardian, service, 80)
    assert registry.state().current == 2
    publish(registry, 4)
    run(guardian, service, 20)
    assert registry.state().canary == 0  # too soon after the last swap
    now[0] += 601
    run(guardian, service, 2)
    assert registry.state().canary == 3


def test_requests_keep_the_version_they_began_with(tmp_path: Path) -> None:
    registry, drafter, guardian, service = guarded(tmp_path, 2, 4, is_automatic=False)
    engine = service.engine
    old = engine.submit(Request("old", np.array([1, 2], dtype=np.int32), SamplingParams(max_new_tokens=30)))
    engine.step()
    registry.promote(2, "now")
    guardian.step()
    engine.step()
    new = engine.submit(Request("new", np.array([1, 2], dtype=np.int32), SamplingParams(max_new_tokens=30)))
    engine.step()
    assert (drafter.version_of("old"), drafter.version_of("new")) == (1, 2)
    while engine.has_work:
        engine.step()
    assert old.output_ids.tolist() == new.output_ids.tolist()
    assert drafter.version_of("old") == 0


def test_a_trial_counts_requests_not_rounds() -> None:
    trial = Trial(GuardOptions(min_requests=2, max_requests=100))
    for mean in (3.0, 1.0):
        trial.add(mean, is_canary=True)
    for mean in (1.9, 2.0, 2.1):
        trial.add(mean, is_canary=False)
    lower, upper = trial.bounds()
    assert lower < -0.5
    assert upper > 0.5
    assert trial.verdict() is None
    error = math.sqrt(1.0 / 1 + np.var([1.9, 2.0, 2.1]) / 2)
    assert lower == pytest.approx(-1.645 * error / 2.0)


def test_a_trial_between_equals_seldom_rejects() -> None:
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(200):
        trial = Trial(GuardOptions(min_requests=50, max_requests=50))
        for _ in range(50):
            trial.add(float(rng.normal(3, 0.5)), is_canary=True)
            trial.add(float(rng.normal(2.0, 0.5)), is_canary=False)
        verdicts.append(trial.verdict())
    assert verdicts == ["promote"] * 200


def test_a_trial_without_a_verdict_ends_undecided() -> None:
    trial = Trial(GuardOptions(min_requests=4, max_requests=6))
    for mean in (1.0, 3.0) * 3:
        trial.add(mean, is_canary=True)
        trial.add(mean, is_canary=False)
    assert trial.verdict() == "undecided"


def test_cusum_is_quiet_on_the_reference_and_quick_on_a_fall() -> None:
    rng = np.random.default_rng(1)
    false_alarms = 0
    for _ in range(40):
        quiet = Cusum(3.0, 0.5, GuardOptions())
        false_alarms += any([quiet.add(float(x)) for x in rng.normal(3.0, 0.5, 500)])
    assert false_alarms <= 5  # one is expected in 19 000 requests
    alarmed = Cusum(3.0, 0.5, GuardOptions())
    delays = [alarmed.add(float(x)) for x in rng.normal(2.0, 0.5, 50)]
    assert delays.index(True) < 12


@pytest.mark.parametrize(
    ("now", "why"),
    [((1.5, 2.0), "bad weights"), ((1.5, 1.0), "drift"), ((2.95, 2.0), None), ((2.4, 1.75), "drift")],
)
def test_drift_is_told_from_bad_weights_by_the_baseline(now: tuple[float, float], why: str | None) -> None:
    assert tell_apart(reference=(3.0, 2.0), now=now) == why


def test_too_many_rollbacks_freeze_the_registry_for_an_hour() -> None:
    limit = RollbackLimit(GuardOptions(min_seconds=10, max_rollbacks=2))
    assert limit.may_promote(0)
    limit.swapped(0, is_rollback=True)
    assert not limit.may_promote(5)
    assert limit.may_promote(11)
    limit.swapped(11, is_rollback=True)
    assert not limit.may_promote(1000)
    assert limit.is_frozen(3599)
    assert limit.may_promote(3601)


def test_shares_are_even_and_independent() -> None:
    shares = [share_of(f"r{i}", "canary") for i in range(2000)]
    assert abs(float(np.mean(np.array(shares) < 0.1)) - 0.1) < 0.03
    other = [share_of(f"r{i}", "shadow") for i in range(2000)]
    assert abs(float(np.corrcoef(shares, other)[0, 1])) < 0.06


def test_a_registry_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(LoadError, match="holds no weights"):
        read_weights("lm", tmp_path)
