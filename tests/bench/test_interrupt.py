"""Ctrl-C on the real command: a partial result that says so, and a resumption that keeps what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from specdec.bench.results_schema import read_result
from tests.tiny_models import byte_tokenizer, tiny_llama

ROUNDS = 4
# The command itself, and a finger that is quick enough on every machine: Ctrl-C comes with the first saved result.
INTERRUPTED = """
import signal
from specdec.bench import run
from specdec.cli import main

write = run.write_result

def write_and_interrupt(path, result):
    write(path, result)
    run.write_result = write
    signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it
run.write_result = write_and_interrupt
main()
"""


def test_sigint_leaves_a_partial_result_and_resume_goes_on(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    traces, out = tmp_path / "t.jsonl", tmp_path / "r.json"
    lines = [{"trace": f"t{i}", "prompt": f"copy {i}: abcdefgh", "response": "abcdefgh abcdefgh"} for i in range(2)]
    traces.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["bench", "--mode", "replay", "--model", str(tmp_path / "model"), "--traces", str(traces),
                 "--arms", "plain,ngram", "--budget", "4", "--rounds", str(ROUNDS), "--out", str(out)]  # fmt: skip
    given = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True, "timeout": 450}
    cut = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], **given)
    assert cut.returncode == 130, cut.stderr
    assert "partial" in cut.stdout
    assert "Traceback" not in cut.stderr
    partial = read_result(out)
    assert partial.is_partial
    assert 0 < len(partial.rows) < ROUNDS * 4
    kept = [row for row in partial.rows if sum(r.round == row.round for r in partial.rows) == 4]

    done = subprocess.run([sys.executable, "-m", "specdec", *arguments, "--resume"], **given)
    assert done.returncode in (0, 1), done.stderr  # 1: the machine's noise may have raised a flag
    whole = read_result(out)
    assert not whole.is_partial
    assert len(whole.rows) == ROUNDS * 4
    assert whole.rows[: len(kept)] == kept
