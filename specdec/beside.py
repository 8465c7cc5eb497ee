"""Work that goes on beside a forward: in a thread of the host, or on a side stream of the device.

Both have one shape: ``start`` before the forward is launched, and the call of what it returned behind that. A thread
begins at once; a side stream waits for what was queued before ``start``, is fed by the host once the forward is queued,
and the main stream goes on behind it. With a number of multiprocessors the side stream lies in a green context of the
driver, which leaves the others to the forward.

Source: FASER (2604.20503), section on frontiers; the fallback to threads is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

from specdec.errors import ConfigError, UnsupportedError

__all__ = ["Beside", "StreamBeside", "ThreadBeside", "beside_for"]

_T = TypeVar("_T")


class Beside(Protocol):
    """Runs one piece of work at a time beside something else."""

    def start(self, work: Callable[[], _T]) -> Callable[[], _T]:
        """Let it begin; what is returned must be called, gives its result, and raises what it raised."""

    def close(self) -> None:
        """Give back what is held."""


class ThreadBeside:
    """A thread of the host (`Beside`). Numba code and torch's operations let go of the interpreter meanwhile."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="specdec-beside")

    def start(self, work: Callable[[], _T]) -> Callable[[], _T]:
        return self._threads.submit(work).result

    def close(self) -> None:
        self._threads.shutdown()


class StreamBeside:
    """A side stream of a CUDA device (`Beside`).

    Args:
        device: whose.
        num_sms: multiprocessors of a green context for the side stream; 0: the stream shares all of them.
        cuda: where streams and events come from; for tests.

    Raises:
        ConfigError: the number is negative.
        UnsupportedError: this torch or its driver has no green contexts.
    """

    def __init__(self, device: torch.device, *, num_sms: int = 0, cuda: Any = torch.cuda) -> None:
        if num_sms < 0:
            raise ConfigError(f"num_sms must be >= 0, got {num_sms}")
        self._device, self._cuda = device, cuda
        self._context: Any = _green_context(cuda, device, num_sms) if num_sms else None
        self._side: Any = self._context.Stream() if self._context is not None else cuda.Stream(device)

    def start(self, work: Callable[[], _T]) -> Callable[[], _T]:
        ready = self._cuda.Event()
        ready.record(self._cuda.current_stream(self._device))

        def finish() -> _T:
            main = self._cuda.current_stream(self._device)
            self._side.wait_event(ready)
            try:
                with self._cuda.stream(self._side):
                    return work()
            finally:  # whatever comes next may use, or reuse, memory that the side stream still works on
                main.wait_stream(self._side)

        return finish

    def close(self) -> None:
        self._side.synchronize()
        self._side = self._context = None


def _green_context(cuda: Any, device: torch.device, num_sms: int) -> Any:
    contexts = getattr(cuda, "green_contexts", None)
    if contexts is None or not contexts.SUPPORTED:
        raise UnsupportedError(f"torch {torch.__version__} has no green contexts here: num_sms must be 0")
    try:
        return contexts.GreenContext.create(num_sms=num_sms, device_id=device.index or 0)
    except RuntimeError as error:
        raise UnsupportedError(f"the driver gives no green context of {num_sms} multiprocessors: {error}") from error


def beside_for(device: torch.device, *, num_sms: int = 0) -> Beside:
    """What a device offers: a side stream, or a thread where it is the CPU.

    Raises:
        ConfigError: multiprocessors of a CPU were asked for, or a negative number of them.
        UnsupportedError: no green contexts.
    """
    if device.type == "cuda":
        return StreamBeside(device, num_sms=num_sms)
    if num_sms:
        raise ConfigError(f"num_sms needs a CUDA device, not {device}")
    return ThreadBeside()
