"""Ctrl-C on the real command: a partial result that says so, and a resumption that keeps what was measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from specdec.bench.results_schema import read_result
from tests.tiny_models import byte_tokenizer, tiny_llama

ROUNDS = 40


def test_sigint_leaves_a_partial_result_and_resume_goes_on(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    traces, out = tmp_path / "t.jsonl", tmp_path / "r.json"
    lines = [{"trace": f"t{i}", "prompt": f"copy {i}: abcdefgh", "response": "abcdefgh abcdefgh"} for i in range(2)]
    traces.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "specdec", "bench", "--mode", "replay", "--model", str(tmp_path / "model"),
               "--traces", str(traces), "--arms", "plain,ngram", "--budget", "4", "--rounds", str(ROUNDS),
               "--out", str(out)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while not out.exists():  # it is written after the first call already
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "nothing was saved"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        shown, noise = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130, noise
    assert "partial" in shown
    assert "Traceback" not in noise
    partial = read_result(out)
    assert partial.is_partial
    assert 0 < len(partial.rows) < ROUNDS * 4
    kept = [row for row in partial.rows if sum(r.round == row.round for r in partial.rows) == 4]

    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode in (0, 1), done.stderr  # 1: the machine's noise may have raised a flag
    whole = read_result(out)
    assert not whole.is_partial
    assert len(whole.rows) == ROUNDS * 4
    assert whole.rows[: len(kept)] == kept
