"""Cores of the affinity, cut to the quota of a container."""

from __future__ import annotations

import os

import pytest
import torch

from specdec.build import build_engine
from specdec.threads import usable_cores
from tests.tiny_models import tiny_llama

HAVE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000\n", HAVE),
        ("100000 100000\n", 1),
        ("50000 100000\n", 1),
        ("150000 100000\n", min(2, HAVE)),
        ("6400000 100000\n", HAVE),
        ("nonsense\n", HAVE),
    ],
)
def test_a_quota_cuts_the_affinity(text, cores, tmp_path):
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert usable_cores(file) == cores
    assert usable_cores(tmp_path / "absent") == HAVE


def test_an_engine_warns_of_more_threads_than_cores(monkeypatch, caplog):
    monkeypatch.setattr(torch, "get_num_threads", lambda: HAVE + 3)
    build_engine(tiny_llama(), "none", max_length=64).close()
    messages = [record.getMessage() for record in caplog.records if "threads" in record.getMessage()]
    assert len(messages) == 1
    assert f"torch runs {HAVE + 3} threads" in messages[0]
    monkeypatch.undo()
    caplog.clear()
    build_engine(tiny_llama(), "none", max_length=64).close()
    assert not [record for record in caplog.records if "threads" in record.getMessage()]
