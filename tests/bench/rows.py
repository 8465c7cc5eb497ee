"""Rows made by hand, for tests of what is derived from them."""

from __future__ import annotations

from specdec.bench.results_schema import Row

__all__ = ["row"]


def row(arm: str = "plain", **given) -> Row:
    """A row of ten plain steps in one second unless said otherwise."""
    values = dict(
        arm=arm, round=0, call=0, source="s", trace="t", prompt_tokens=5, output_tokens=10, seconds=1.0,
        first_token_s=0.1, num_steps=10, num_accepted=0, accepted_histogram=[10], output_sha256="x",
        same_output=True, distinct_ngrams=1.0,
    )  # fmt: skip
    return Row.model_validate({**values, **given})
