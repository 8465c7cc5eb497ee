"""Small masked diffusion LMs in the form of transformers, with code of their own as LLaDA and Dream come."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from tests.tiny_models import byte_tokenizer

__all__ = ["MASK_ID", "VOCAB_SIZE", "write_bert", "write_masked_llama"]

VOCAB_SIZE, MASK_ID = 260, 259  # one token per byte, the end, two that mean nothing, the mask
_CODE = '''\
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class TinyConfig(LlamaConfig):
    model_type = "{kind}"


class TinyModel(LlamaForCausalLM):
    """A Llama that sees both ways."""

    config_class = TinyConfig

    def forward(self, input_ids, position_ids=None, past_key_values=None, use_cache=False, **kwargs):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        rows = input_ids.shape[1]
        everything = torch.zeros(len(input_ids), 1, rows, past + rows, dtype=self.dtype, device=input_ids.device)
        return super().forward(
            input_ids=input_ids, attention_mask=everything, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache,
        )
'''


def write_masked_llama(path: Path, *, kind: str = "llada_like", seed: int = 0, has_tokenizer: bool = True) -> Path:
    """A checkpoint with an ``auto_map`` and the code that it names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
    model.save_pretrained(path)
    said = json.loads((path / "config.json").read_text())
    said |= {
        "model_type": kind, "architectures": ["TinyModel"], "mask_token_id": MASK_ID,
        "auto_map": {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyModel"},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(said))
    (path / "modeling_tiny.py").write_text(_CODE.format(kind=kind))
    if has_tokenizer:
        byte_tokenizer().save_pretrained(path)
    return path


def write_bert(path: Path) -> Path:
    """A masked LM that transformers knows without foreign code."""
    config = BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path
