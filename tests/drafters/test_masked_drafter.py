"""Masked diffusion LMs as drafters: one pass per block, chunk after chunk while sure; the text never changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdec.build import build_engine
from specdec.drafters.block_length import ChunkLength, FixedLength
from specdec.drafters.diffusion_loading import load_diffusion
from specdec.drafters.masked_drafter import MaskedLmDrafter
from specdec.drafters.masked_lm import MaskedLm, load_masked_lm
from specdec.drafters.probing import probe_ids
from specdec.drafters.token_map import TokenMap
from specdec.errors import ConfigError, UnsupportedError
from tests.drafters.drafting import run
from tests.drafters.masked_models import MASK_ID, VOCAB_SIZE, write_bert, write_masked_llama
from tests.tiny_models import byte_tokenizer, save_tiny_llama, tiny_llama

PROMPTS = [
    np.frombuffer(text, dtype=np.uint8).astype(np.int32) for text in (b"def add(a, b):", b"x", b"for i in range")
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masked_llama(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def masked(path: Path) -> MaskedLm:
    device = torch.device("cpu")
    return load_masked_lm(path, device=device, dtype=torch.float32, probe_ids=None, trust=1)


def same() -> TokenMap:
    return TokenMap.of(byte_tokenizer(), byte_tokenizer(), own_size=VOCAB_SIZE, target_size=257)


@pytest.mark.parametrize("is_shifted", [False, True])
def test_a_draft_is_the_argmax_of_one_pass_over_masks(masked: MaskedLm, is_shifted: bool) -> None:
    lm = MaskedLm(masked.model, mask_token_id=MASK_ID, is_shifted=is_shifted)
    drafter = MaskedLmDrafter(lm, same(), rule=FixedLength(), block=4)
    _, watch = run(tiny_llama(), drafter, PROMPTS, 6)
    for text, tree in watch.seen:
        if len(tree) == 1:
            continue
        num = min(4, tree.num_draft_tokens)
        ids = torch.tensor([text + [MASK_ID] * num])
        with torch.no_grad():
            logits = masked.model(ids).logits[0, len(text) - is_shifted : len(text) - is_shifted + num, :257]
        assert tree.token_ids[1:].tolist() == logits.argmax(-1).tolist()
        assert tree.num_draft_tokens == num


@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 1.0}])
@pytest.mark.parametrize("options", ["", "&rule=ema&block=5", "&size=2&at=0.02&most=9", "&rule=threshold&at=0.03"])
def test_the_text_is_that_of_plain_decoding(path: Path, options: str, law: dict[str, Any]) -> None:
    model = tiny_llama()
    plain, _ = run(model, "none", PROMPTS, 16, **law)
    drafter: Any = f"diffusion:{path}?trust=1{options}"
    drafted, _ = run(model, drafter, PROMPTS, 16, tokenizer=byte_tokenizer(), **law)
    assert [s.output_ids.tolist() for s in drafted] == [s.output_ids.tolist() for s in plain]
    assert sum(state.num_drafted for state in drafted) > 0


def test_the_chunk_rule_goes_on_while_sure_and_keeps_the_chunk_that_ends_it(masked: MaskedLm) -> None:
    def lengths(at: float, most: int = 9) -> set[int]:
        drafter = MaskedLmDrafter(masked, same(), rule=ChunkLength(size=3, at=at, most=most))
        _, watch = run(tiny_llama(), drafter, PROMPTS, 30, budget=20)
        return {tree.num_draft_tokens for text, tree in watch.seen if len(text) < 20}

    assert lengths(0.0) == {9}
    assert lengths(0.0, most=7) == {7}
    assert lengths(1.0) == {3}


def test_honest_chains_are_judged_and_rules_that_anticipate_are_not(path: Path) -> None:
    own = {"tokenizer": byte_tokenizer(), "verifier": "block"}
    states, watch = run(tiny_llama(), f"diffusion:{path}?trust=1", PROMPTS, 10, temperature=1.0, **own)
    assert all(state.num_output_tokens == 10 for state in states)
    for _, tree in watch.seen:
        assert tree.draft_probs is None or torch.allclose(tree.draft_probs[:-1].sum(-1), torch.ones(1).double())
    with pytest.raises(UnsupportedError, match="only the match rule keeps the target's law"):
        build_engine(tiny_llama(), f"diffusion:{path}?trust=1&rule=threshold&own=1", **own)


def test_a_model_without_foreign_code_needs_no_trust(tmp_path: Path) -> None:
    drafter: Any = load_diffusion(write_bert(tmp_path), tiny_llama(), byte_tokenizer(), None, mask=MASK_ID)
    states, _ = run(tiny_llama(), drafter, PROMPTS, 8)
    assert sum(state.num_drafted for state in states) > 0


@pytest.mark.parametrize("is_shifted", [False, True])
def test_the_row_that_guesses_a_mask_is_found(path: Path, masked: MaskedLm, is_shifted: bool, monkeypatch: Any) -> None:
    """A model that copies the probe's text at the masks, in its own row or in the one before."""
    ids = probe_ids(byte_tokenizer())

    def forward(self: Any, token_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        wanted = torch.tensor(ids[: token_ids.shape[1]] + [0])[: token_ids.shape[1]].roll(-1 if is_shifted else 0)
        noise = token_ids.roll(-1)[..., None] * torch.arange(VOCAB_SIZE) * 1e-9  # it sees ahead
        return torch.nn.functional.one_hot(wanted, VOCAB_SIZE).float()[None] + noise

    monkeypatch.setattr(MaskedLm, "forward", forward)
    device = torch.device("cpu")
    for kind in ("llada_like", "dream_like"):
        other = write_masked_llama(path.parent / kind, kind=kind, has_tokenizer=False)
        found = load_masked_lm(other, device=device, dtype=torch.float32, probe_ids=ids, trust=1)
        assert found.is_shifted == is_shifted
        stated = load_masked_lm(other, device=device, dtype=torch.float32, probe_ids=None, trust=1)
        assert stated.is_shifted == (kind == "dream_like")


def test_vocabularies_are_mapped_by_their_tokens() -> None:
    own, target = byte_tokenizer(), byte_tokenizer()
    target.add_tokens(["<more>"])
    tokens = TokenMap.of(own, target, own_size=VOCAB_SIZE, target_size=258)
    assert tokens.own(np.array([3, 256], dtype=np.int32)) == [3, 256]
    assert tokens.own(np.array([3, 257], dtype=np.int32)) is None
    moved = other_order()
    tokens = TokenMap.of(moved, own, own_size=VOCAB_SIZE, target_size=257)
    ids = np.array([0, 7, 255], dtype=np.int32)
    found = tokens.own(ids)
    assert found is not None
    assert moved.convert_ids_to_tokens(found) == own.convert_ids_to_tokens(ids.tolist())
    logits = torch.randn(3, VOCAB_SIZE)
    spread = tokens.over_target(logits)
    assert torch.equal(spread[:, ids.astype(np.int64)], logits[:, found])
    with pytest.raises(UnsupportedError, match="260 tokens and the target 257"):
        TokenMap.of(None, own, own_size=VOCAB_SIZE, target_size=257)
    with pytest.raises(UnsupportedError, match="knows .*% of the target's tokens; it needs 50%"):
        TokenMap.of(other_order(100), own, own_size=VOCAB_SIZE, target_size=257)


def other_order(size: int = 256) -> Any:
    """Some of the tokens of the byte tokenizer, backwards."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    known = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: -item[1])[-size:]
    vocab = {token: index for index, (token, _) in enumerate(known)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[])))


def test_what_cannot_draft_is_refused(path: Path, tmp_path: Path) -> None:
    target = tiny_llama()
    with pytest.raises(UnsupportedError, match="Python code of its own: trust=1 runs it"):
        build_engine(target, f"diffusion:{path}")
    causal = save_tiny_llama(tmp_path / "causal")
    with pytest.raises(ConfigError, match="does not say mask_token_id"):
        build_engine(target, f"diffusion:{causal}")
    with pytest.raises(UnsupportedError, match="sees no later token"):
        build_engine(target, f"diffusion:{causal}?mask=3")
    for option, message in (("block=0", "block must be >= 1"), ("rule=apd", "a masked LM has none")):
        with pytest.raises(ConfigError, match=message):
            build_engine(target, f"diffusion:{path}?trust=1&{option}", tokenizer=byte_tokenizer())
    with pytest.raises(ConfigError, match=r"the mask's id must be in \[0, 260\), got 999"):
        build_engine(target, f"diffusion:{path}?trust=1&mask=999", tokenizer=byte_tokenizer())
