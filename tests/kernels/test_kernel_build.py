"""Every kernel compiles ahead of time for every architecture, and none spills: the interpreter accepts more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_kernel_compiles_for_every_architecture_without_a_spill(tmp_path):
    # In a process of its own: here the kernels are interpreted.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = tmp_path / "build.json"
    run = subprocess.run(
        [sys.executable, "-m", "specdec.bench.kernel_build", "--json", str(result)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    sys.stdout.write(run.stdout)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = json.loads(result.read_text())["rows"]
    names = {row["name"] for row in rows}
    assert len(rows) == 4 * len(names)
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for kernel in ("tree attention", "verify", "kv commit", "top-k", "distillation", "strict product"):
        assert any(name.startswith(kernel) for name in names), kernel
    assert all(0 < row["registers"] <= 512 and row["stack_bytes"] == 0 for row in rows)
