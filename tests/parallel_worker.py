"""One rank of ``tests/test_parallel.py``: decodes with its share of the model, and with a drafter that only it has."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from specdec.build import build_engine
from specdec.check.hostile import HostileDrafter
from specdec.types import Request, SamplingParams


def main() -> None:
    torch.set_num_threads(1)
    folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    rank = int(os.environ["RANK"])
    config = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=dtype).eval()
    likely = {key: [ids] for key, ids in json.loads((folder / "plain.json").read_text()).items()}
    # Another seed on every rank: what they guess differs, and only rank 0 may be heard.
    drafter = HostileDrafter(likely, model.config.vocab_size, seed=rank)
    texts: dict[str, list[int]] = {key: [] for key in likely}
    with build_engine(model, drafter, budget=5, max_length=128, max_batch_size=2) as engine:
        ended = []
        for output in engine.generate(requests()):
            texts[output.request_id] += output.new_ids
            ended += [output] if output.finish_reason else []
        num_drafted = sum(output.state.num_drafted for output in ended)
    (folder / f"rank{rank}.json").write_text(json.dumps({"texts": texts, "num_drafted": num_drafted}))
    distributed.destroy_process_group()


def requests() -> list[Request]:
    return [
        Request(str(i), np.arange(3 + i, 20, dtype=np.int32), SamplingParams(max_new_tokens=24, temperature=t, seed=3))
        for i, t in enumerate((0.0, 1.0))
    ]


if __name__ == "__main__":
    main()
