"""Arms that take turns step by step, each on its own clock: what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specdec.bench.arms import EngineArm, Job, JobResult

__all__ = ["TurnClock", "decode_seconds", "run_in_turns"]


class TurnClock:
    """A clock, in seconds, that runs for one party at a time and stands still for the others.

    Args:
        clock: what is read.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: dict[str, float] = {}
        self._party, self._base, self._since = "", 0.0, clock()

    def __call__(self) -> float:
        return self._base + self._clock() - self._since

    def turn(self, party: str) -> None:
        """From now on it is this party's time."""
        self._times[self._party] = self()
        self._party, self._base, self._since = party, self._times.get(party, 0.0), self._clock()


def run_in_turns(arms: Sequence[EngineArm], jobs: Sequence[Job], clock: TurnClock) -> dict[str, list[JobResult]]:
    """Every arm answers the calls, all at once: a step of the first, a step of the second, and so on.

    Args:
        arms: of different names; their times must be read from ``clock``.
        jobs: the calls.
        clock: it is told whose turn it is.
    """
    done: dict[str, dict[int, JobResult]] = {arm.name: {} for arm in arms}
    running = [(arm.name, arm.run_steps(jobs, done[arm.name])) for arm in arms]
    while running:
        for name, steps in list(running):
            clock.turn(name)
            if next(steps, "over") == "over":
                running.remove((name, steps))
    clock.turn("")
    return {name: [results[index] for index in range(len(jobs))] for name, results in done.items()}


def decode_seconds(results: Sequence[JobResult], concurrency: int) -> tuple[int, float]:
    """Tokens and seconds of decoding; of many requests at a time, those of the steps in which all of them decode.

    Prompts and the end, when fewer and fewer go on, are left out: how many such steps there are depends on how the
    lengths of the calls fall, and they say nothing about speculation.
    """
    if concurrency == 1:
        return sum(sum(one.emitted[1:]) for one in results), sum(one.stamps[-1] - one.stamps[0] for one in results)
    emitted: dict[float, list[int]] = {}
    has_prompt = set[float]()
    for one in results:
        stamps = [round((one.start_s or 0.0) + stamp, 7) for stamp in one.stamps]
        has_prompt.add(stamps[0])
        for stamp, count in zip(stamps, one.emitted, strict=True):
            emitted.setdefault(stamp, []).append(count)
    ends = sorted(emitted)
    whole = [
        (sum(emitted[end]), end - begin)
        for begin, end in zip(ends, ends[1:], strict=False)
        if len(emitted[end]) == concurrency and end not in has_prompt
    ]
    return sum(tokens for tokens, _ in whole), sum(seconds for _, seconds in whole)
