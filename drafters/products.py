"""Products with a head's weights; on a CPU in packed form, one product for all weights that read the same rows.

The packed form is a copy: the weights themselves stay, so that somebody may write new values into them while the head
serves. Each product looks at the versions of its weights and packs anew after such a write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from specdec.packed_linear import pack_weight, packed_product

__all__ = ["Products"]


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """Stacked weights in packed form, and what they were made from."""

    made_from: Sequence[tuple[str, Tensor, int]]  # name, tensor, its version then
    sizes: Sequence[int]  # rows of each weight
    packed: Tensor | None  # None: it does not pay
    bias: Tensor | None

    def is_of(self, weights: Mapping[str, Tensor]) -> bool:
        return all(weights.get(name) is mine and mine._version == version for name, mine, version in self.made_from)


class Products:
    """``x @ weight.T + bias`` by name, without gradients once ``is_packing``."""

    def __init__(self) -> None:
        self.is_packing = False
        self._forms: dict[tuple[str, ...], _Form] = {}

    def of(self, weights: Mapping[str, Tensor], x: Tensor, *names: str) -> Sequence[Tensor]:
        """[T, N] for each of ``names``, from x [T, K]: with ``NAME.weight`` [N, K] and its bias, where there is one."""
        if self.is_packing and not torch.is_grad_enabled():
            form = self._forms.get(names)
            if form is None or not form.is_of(weights):
                form = self._forms[names] = _made(weights, names)
            if form.packed is not None:
                out = packed_product(x, form.packed, form.bias)
                return (out,) if len(names) == 1 else out.split(form.sizes, dim=-1)
        return [linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in names]


def _made(weights: Mapping[str, Tensor], names: Sequence[str]) -> _Form:
    keys = [f"{name}.{part}" for name in names for part in ("weight", "bias") if f"{name}.{part}" in weights]
    sizes = [len(weights[f"{name}.weight"]) for name in names]
    if any(weights[key].is_inference() for key in keys):  # such tensors have no versions
        return _Form([], sizes, None, None)
    made_from = [(key, weights[key], weights[key]._version) for key in keys]
    with torch.inference_mode(False), torch.no_grad():
        parts = [weights[f"{name}.weight"].detach() for name in names]
        packed = pack_weight(torch.cat(parts) if len(parts) > 1 else parts[0])
        bias = None
        if len(keys) > len(names):
            given = [weights.get(f"{name}.bias") for name in names]
            bias = torch.cat([parts[0].new_zeros(n) if b is None else b for n, b in zip(sizes, given, strict=True)])
    return _Form(made_from, sizes, packed, bias)
