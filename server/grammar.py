"""Answers of a wanted form: a grammar masks the scores at every tree node and cuts drafts that break it.

The grammar machinery is llguidance's. A processor is a pure function of (prefix, scores), as the verifier demands: the
matcher is moved to each node's prefix by undoing and redoing tokens, so the order in which nodes are asked does not
matter. Separators of JSON are fixed (", " and ": ", no other white space), so that every answer comes to an end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher

from specdec.errors import RequestError, UnsupportedError
from specdec.types import DraftTree, RequestState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["GrammarCompiler", "GrammarProcessor"]

_DEFAULTS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarCompiler:
    """Makes grammars for one tokenizer; preparing the vocabulary takes a moment and is done once.

    Args:
        tokenizer: a fast one.
        eos_ids: end tokens.

    Raises:
        UnsupportedError: the tokenizer is of a kind that llguidance does not read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> None:
        self._num_tokens = len(tokenizer)
        try:
            self._vocabulary = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=self._num_tokens, eos_token=list(eos_ids) or None
            )
        except Exception as error:  # whatever the library says of a tokenizer that it cannot read
            raise UnsupportedError(f"this tokenizer cannot be constrained by a grammar: {error}") from error

    def json_schema(self, schema: Mapping[str, Any] | None) -> str:
        """The grammar of a JSON schema; None: of any JSON object.

        Raises:
            RequestError: the schema is none, or uses what cannot be enforced.
        """
        text = json.dumps(schema if schema is not None else {"type": "object"})
        return self._checked(LLMatcher.grammar_from_json_schema(text, defaults=_DEFAULTS), "json_schema")

    def tool_calls(self, schemas: Mapping[str, Mapping[str, Any]]) -> str:
        """The grammar of one call of one of the named functions, in the form ``<tool_call>{...}</tool_call>``.

        Raises:
            RequestError: a schema cannot be enforced.
        """
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": schema or {"type": "object"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, schema in schemas.items()
        ]
        options = {"x-guidance": _DEFAULTS}
        body = json.dumps((calls[0] if len(calls) == 1 else {"anyOf": calls}) | options)
        lark = f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {body}\n'
        return self._checked(LLMatcher.grammar_from_lark(lark), "tools")

    def processor(self, grammar: str, num_prompt_tokens: int) -> GrammarProcessor:
        """A fresh processor of one request."""
        return GrammarProcessor(LLMatcher(self._vocabulary, grammar), num_prompt_tokens, self._num_tokens)

    def _checked(self, grammar: str, name: str) -> str:
        problem = LLMatcher.validate_grammar(grammar, self._vocabulary)
        if problem:
            raise RequestError(f"{name} cannot be enforced: {problem}")
        return grammar


class GrammarProcessor:
    """Lets only tokens pass that the grammar allows after a prefix (a logits processor of one request).

    Args:
        matcher: at its start.
        num_prompt_tokens: the grammar rules what comes after them.
        num_tokens: of the tokenizer; scores beyond it belong to no token.
    """

    def __init__(self, matcher: LLMatcher, num_prompt_tokens: int, num_tokens: int) -> None:
        self._matcher = matcher
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = num_tokens
        self._consumed: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[1, V] scores with minus infinity where the grammar forbids; a prefix that breaks it changes nothing."""
        if not self._move(input_ids[0, self._num_prompt_tokens :].tolist()):
            return scores
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed = np.zeros(scores.shape[-1], dtype=np.bool_)
        size = min(self._num_tokens, len(allowed))
        allowed[:size] = bits[:size]
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)

    def trim(self, state: RequestState, tree: DraftTree) -> DraftTree:
        """The tree without the nodes that the grammar forbids: they could not be accepted, so they need no forward."""
        base = state.output_ids.tolist()
        kept = [0]
        for node in range(1, len(tree)):
            if int(tree.parents[node]) in kept and self._move([*base, *tree.token_ids[tree.path(node)[1:]].tolist()]):
                kept.append(node)
        if len(kept) == len(tree):
            return tree
        place = {node: index for index, node in enumerate(kept)}
        parents = np.array([place.get(int(tree.parents[node]), -1) for node in kept], dtype=np.int32)
        values = None if tree.values is None else tree.values[kept]
        sources = None if tree.sources is None else tree.sources[kept]
        return DraftTree(tree.token_ids[kept], parents, values, sources)

    def _move(self, output_ids: Sequence[int]) -> bool:
        """Bring the matcher behind these tokens; False, and anywhere, if the grammar does not lead there."""
        common = 0
        for mine, wanted in zip(self._consumed, output_ids, strict=False):
            if mine != wanted:
                break
            common += 1
        if common < len(self._consumed):
            self._matcher.rollback(len(self._consumed) - common)
            del self._consumed[common:]
        rest = list(output_ids[common:])
        num_taken = self._matcher.try_consume_tokens(rest) if rest else 0
        self._consumed += rest[:num_taken]
        return num_taken == len(rest)
