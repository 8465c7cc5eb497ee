"""A draft model with another tokenizer: text goes over, the target's text stays what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.build import build_engine
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.lm_text import TextLmDrafter
from specdec.errors import ConfigError, UnsupportedError
from specdec.types import Request, RequestState, SamplingParams
from tests.tiny_models import byte_tokenizer, tiny_llama

CYCLE = "abcdefgh "


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and ``ab``, ``cd``, ``ef`` as tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("c", "d"), ("e", "f")]
    vocab = {text: i for i, text in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def successor_model(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> LlamaForCausalLM:
    """A model without layers' influence whose next token is fixed by the last one: it writes the cycle on and on."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=vocab_size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=256, eos_token_id=None, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size))
        ids = tokenizer(CYCLE)["input_ids"]
        for here, after in zip(ids, [*ids[1:], ids[0]], strict=True):
            model.lm_head.weight[after, here] = 1
    return model


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return successor_model(byte_tokenizer(), 270)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draft")
    tokenizer = pair_tokenizer()
    successor_model(tokenizer, 260).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def request(words: str, **sampling: float) -> Request:
    ids = np.array(byte_tokenizer()(words)["input_ids"], dtype=np.int32)
    return Request(words, ids, SamplingParams(max_new_tokens=40, **sampling))  # type: ignore[arg-type]


def decode(target: LlamaForCausalLM, drafter: object, words: list[str], **sampling: float) -> list[RequestState]:
    with build_engine(target, drafter, budget=12, tokenizer=byte_tokenizer()) as engine:  # type: ignore[arg-type]
        last = {output.request_id: output.state for output in engine.generate([request(w, **sampling) for w in words])}
    return [last[w] for w in words]


def test_what_the_draft_model_writes_is_accepted_in_the_targets_tokens(target: LlamaForCausalLM, saved: Path) -> None:
    words = ["abcdefgh abcdefgh abcdefgh ab", "gh abcd", "a"]
    plain = decode(target, "none", words)
    drafted = decode(target, f"lm:{saved}?depth=6", words)
    assert [s.output_ids.tolist() for s in drafted] == [s.output_ids.tolist() for s in plain]
    assert byte_tokenizer().decode(plain[0].output_ids).startswith("cdefgh abcdefgh")
    for state in drafted:  # 6 own tokens are up to 9 bytes
        assert state.num_output_tokens / state.num_steps > 5


def test_sampled_text_stays_and_odd_bytes_are_survived(target: LlamaForCausalLM, saved: Path) -> None:
    model = tiny_llama(seed=1)  # writes bytes that are no text
    words = ["abc é", "xyz", "éé"]
    plain = decode(model, "none", words, temperature=1.0)
    drafted = decode(model, f"lm:{saved}", words, temperature=1.0)
    assert [s.output_ids.tolist() for s in drafted] == [s.output_ids.tolist() for s in plain]


def test_nothing_stays_behind_and_a_full_cache_only_ends_the_guesses(target: LlamaForCausalLM) -> None:
    own = pair_tokenizer()
    scorer = DraftModel(successor_model(own, 260), kv_tokens=20, max_length=256)
    drafter = TextLmDrafter(scorer, own=own, target=byte_tokenizer(), vocab_size=270)
    words = [CYCLE * 2, CYCLE * 3]
    plain = decode(target, "none", words)
    assert [s.output_ids.tolist() for s in decode(target, drafter, words)] == [s.output_ids.tolist() for s in plain]
    assert scorer.num_used == 0


def test_it_needs_the_match_rule_and_a_positive_depth(target: LlamaForCausalLM, saved: Path) -> None:
    with pytest.raises(UnsupportedError, match="needs the match rule"):
        build_engine(target, f"lm:{saved}", verifier="block", tokenizer=byte_tokenizer())
    with pytest.raises(ConfigError, match="depth must be >= 1, got 0"):
        build_engine(target, f"lm:{saved}?depth=0", tokenizer=byte_tokenizer())
