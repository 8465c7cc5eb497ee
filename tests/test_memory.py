"""What is left, read from the accounts that Linux keeps."""

from __future__ import annotations

from pathlib import Path

import torch

from specdec.memory import free_bytes

CPU = torch.device("cpu")


def accounts(folder: Path, available: str | None, limit: str | None, used: str = "0") -> dict[str, Path]:
    if available is not None:
        (folder / "meminfo").write_text(f"MemTotal: 99 kB\nMemFree: 1 kB\n{available}\n", encoding="ascii")
    if limit is not None:
        (folder / "memory.max").write_text(limit, encoding="ascii")
        (folder / "memory.current").write_text(used, encoding="ascii")
    return {"meminfo": folder / "meminfo", "cgroup": folder}


def test_file_caches_count_as_free(tmp_path: Path) -> None:
    assert free_bytes(CPU, **accounts(tmp_path, "MemAvailable: 40 kB", None)) == 40 * 1024


def test_a_container_may_have_less_than_the_machine(tmp_path: Path) -> None:
    assert free_bytes(CPU, **accounts(tmp_path, "MemAvailable: 40 kB", "10000\n", "4000\n")) == 6000
    assert free_bytes(CPU, **accounts(tmp_path, "MemAvailable: 40 kB", "10000\n", "12000\n")) == 0
    assert free_bytes(CPU, **accounts(tmp_path, "MemAvailable: 40 kB", "max\n")) == 40 * 1024


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert free_bytes(CPU, **accounts(tmp_path, None, None)) is None
    assert free_bytes(CPU, **accounts(tmp_path, "Nothing: 1 kB", None)) is None


def test_this_machine_says_something() -> None:
    free = free_bytes(CPU)
    assert free is None or 0 < free < 2**50
