"""Models small enough to be made in a test: two layers, random weights, a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["byte_tokenizer", "save_tiny_llama", "tiny_llama"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then ``<eos>`` with id 256."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<eos>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def tiny_llama(*, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 257 tokens and about 60 thousand weights, the same for the same seed."""
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save_tiny_llama(directory: Path, *, has_tokenizer: bool = True) -> Path:
    """Write a tiny model as ``save_pretrained`` does; returns the directory."""
    tiny_llama().save_pretrained(directory)
    if has_tokenizer:
        byte_tokenizer().save_pretrained(directory)
    return directory
