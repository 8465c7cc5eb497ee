"""Linear layers whose weights lie in memory in the order in which a CPU matrix product reads them.

oneDNN can bring a weight into its own blocked layout once; a plain ``nn.Linear`` does that in every call, or reads with
large strides. Packing *replaces* layers for as long as somebody holds it: the dense weight is freed and comes back, bit
for bit, when the last holder lets go. A matrix that the input embedding shares is packed where the embedding can read
its rows from the packed layout, else it stays dense for both. So no weight is held twice.

Packed and dense products differ in rounding only. From two rows on, a row's bits do not depend on how many other rows
there are; ``numerics="strict"`` builds on that.

Source: oneDNN's inner product primitive and its opaque weight formats, through torch's ``mkldnn`` operators.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import nn

from specdec.errors import UnsupportedError
from specdec.fused_norm import fuse_norms
from specdec.stand_ins import StandIn, children, is_free, let_go

__all__ = [
    "PackedEmbedding",
    "PackedLinear",
    "pack_linears",
    "pack_weight",
    "packed_product",
    "packing_obstacle",
    "unpack_linears",
]

_LANES: Final = 64  # output features side by side in the blocked layout
# Elements below which a dense product of one row is faster: there a call's fixed cost is what counts (10 us against 2
# in float32, where a dense row goes straight to MKL; dense bfloat16 goes through oneDNN anyway and repacks). Measured
# with weights that a model has between two uses of this one, so that they come from memory and not from a cache.
_LEAST_ELEMENTS: Final = {torch.float32: 1 << 16, torch.bfloat16: 1 << 13}
_BITS: Final = {2: torch.int16, 4: torch.int32}
_Rows: TypeAlias = npt.NDArray[Any]  # [blocks, K / p, 64, p], the bits of the values as integers


class _Packed(StandIn):
    """What both kinds of packed layers share: the weight, and the dense layer that they stand for."""

    def __init__(self, dense: nn.Linear | nn.Embedding, weight: torch.Tensor) -> None:
        super().__init__(dense)
        self.weight = nn.Parameter(weight, requires_grad=False) if weight.is_mkldnn else dense.weight

    def dense_weight(self) -> torch.Tensor:
        """[N, K] strided: the weight as it was."""
        return self.weight.to_dense() if self.weight.is_mkldnn else self.weight.data

    def restored(self) -> nn.Module:
        dense: Any = super().restored()
        if self.weight.is_mkldnn and dense.weight.numel() == 0:  # a tied weight comes back once
            dense.weight.data = self.dense_weight()
        return dense  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        dense: Any = super().restored()
        if id(dense.weight) not in memo:
            memo[id(dense.weight)] = nn.Parameter(self.dense_weight().clone(), dense.weight.requires_grad)
        return super().__deepcopy__(memo)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.dense_weight()


class PackedLinear(_Packed):
    """Stands in for an ``nn.Linear``, for inference.

    Args:
        dense: the layer.
        weight: [N, K] packed, or ``dense.weight`` itself where that is shared and cannot be packed.
    """

    def __init__(self, dense: nn.Linear, weight: torch.Tensor) -> None:
        super().__init__(dense, weight)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.bias = dense.bias
        self._operands = (self.weight, dense.bias)  # a module looks its parameters up one by one
        self.strict_holders: set[Hashable] = set()

    def let_go(self, holders: set[Hashable]) -> None:
        super().let_go(holders)
        self.strict_holders -= holders

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] from x [..., K].

        Raises:
            UnsupportedError: gradients would be lost here.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError("packed weights cannot be trained: close the model's engines, or unpack_linears(it)")
        weight, bias = self._operands
        if self.strict_holders and x.numel() == self.in_features:  # one row may take another path through oneDNN
            rows = x.reshape(1, self.in_features).expand(2, -1)
            return packed_product(rows, weight, bias)[:1].view(*x.shape[:-1], self.out_features)
        return packed_product(x, weight, bias)


class PackedEmbedding(_Packed):
    """Stands in for an ``nn.Embedding`` whose matrix a packed linear layer shares, and reads its rows from there.

    Args:
        dense: the layer.
        weight: [N, K] packed.
        rows: the same memory as ``_packed_rows`` sees it.
    """

    def __init__(self, dense: nn.Embedding, weight: torch.Tensor, rows: _Rows) -> None:
        super().__init__(dense, weight)
        self.num_embeddings, self.embedding_dim = dense.num_embeddings, dense.embedding_dim
        self.padding_idx = dense.padding_idx
        self._rows = (rows,)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., K] from ids [...] int64.

        Raises:
            IndexError: an id is outside [0, N).
        """
        found = torch.empty(*ids.shape, self.embedding_dim, dtype=self.weight.dtype)
        flat = ids.reshape(-1).numpy()
        bad = _gather(self._rows[0], flat, self.num_embeddings, _bits(found).reshape(len(flat), self.embedding_dim))
        if bad >= 0:
            raise IndexError(f"ids must be in [0, {self.num_embeddings}), got {flat[bad]}")
        return found


def packing_obstacle(model: nn.Module) -> str | None:
    """Why the model's linear layers cannot be packed, in words; None: they can."""
    devices = sorted({parameter.device.type for parameter in model.parameters()})
    if devices != ["cpu"]:
        return f"packing is for models on the CPU, this one is on {', '.join(devices) or 'no device'}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return f"torch {torch.__version__} was built without the oneDNN operators that packing needs"
    dtypes = {layer.weight.dtype for _, _, layer in children(model, nn.Linear)}
    if not dtypes & set(_LEAST_ELEMENTS):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"no linear layer is in float32 or bfloat16 ({names or 'there are none'})"
    if torch.float32 not in dtypes and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 arithmetic that oneDNN can use"
    return None


def pack_linears(model: nn.Module, holder: Hashable, *, strict: bool = False) -> int:
    """Pack every linear layer for which it pays, and fuse norms, until ``holder`` lets go.

    Layers with hooks, or whose forward somebody replaced, stay as they are.

    Args:
        model: in evaluation mode, without a ``packing_obstacle``.
        holder: names who holds; packing twice for one holder is packing once.
        strict: pack layers of every size, and make single rows take the same way as many.

    Returns:
        How many linear layers are now held.

    Raises:
        UnsupportedError: ``strict``, and a layer cannot be packed.
    """
    users = _users_of_weights(model)
    done: dict[int, nn.Module] = {}
    with torch.inference_mode(False), torch.no_grad():
        for parent, name, layer in list(children(model, nn.Linear)):
            if id(layer) in done:
                setattr(parent, name, done[id(layer)])
                continue
            if not (is_free(layer) and layer.weight.dtype in _LEAST_ELEMENTS and layer.weight.numel()):
                if strict:
                    raise UnsupportedError(
                        f"strict numerics need every linear layer packed, but {name!r} of {type(parent).__name__} has "
                        f"hooks, a forward or a kind of weight of its own, or dtype {layer.weight.dtype}"
                    )
                continue
            if strict or layer.weight.numel() >= _LEAST_ELEMENTS[layer.weight.dtype]:
                done[id(layer)] = _replace(parent, name, layer, users[id(layer.weight)])
    fuse_norms(model, holder)
    held = 0
    for _, _, packed in children(model, _Packed):
        packed.holders.add(holder)
        if isinstance(packed, PackedLinear):
            held += 1
            if strict:
                packed.strict_holders.add(holder)
    return held


def unpack_linears(model: nn.Module, holder: Hashable | None = None) -> None:
    """Let go of a model's packed layers and fused norms; those that nobody holds become what they were, bit for bit.

    Args:
        model: packed or not.
        holder: who lets go; None: everybody.
    """
    with torch.inference_mode(False), torch.no_grad():
        let_go(model, holder)


def pack_weight(weight: torch.Tensor) -> torch.Tensor | None:
    """A packed copy of a weight [N, K] for ``packed_product``; None where that is impossible or does not pay."""
    least = _LEAST_ELEMENTS.get(weight.dtype)
    if weight.device.type != "cpu" or least is None or weight.numel() < least:
        return None
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return None
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    with torch.inference_mode(False), torch.no_grad():
        return _reorder(weight)


def packed_product(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[..., N] from rows [..., K] and a packed weight, without gradients."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, packed, bias, "none", [], "")
    return out


def _users_of_weights(model: nn.Module) -> dict[int, list[tuple[nn.Module, str, nn.Module]]]:
    """Id of a parameter -> the places (parent, name) of the layers that own it."""
    users: dict[int, list[tuple[nn.Module, str, nn.Module]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            for parameter in child._parameters.values() if child is not None else ():
                if parameter is not None and child is not None:
                    users.setdefault(id(parameter), []).append((parent, name, child))
    return users


def _replace(
    parent: nn.Module, name: str, layer: nn.Linear, users: list[tuple[nn.Module, str, nn.Module]]
) -> PackedLinear:
    """Put a packed layer where ``layer`` is; free the dense weight unless others read it."""
    others = [user for user in users if user[2] is not layer]
    embeddings = [(place, attribute, user) for place, attribute, user in others if _can_read_packed(user)]
    packed = _reorder(layer.weight.data)
    rows = _packed_rows(packed, layer.weight.data) if others else None
    can_free = not others or (rows is not None and len(embeddings) == len(others))
    made = PackedLinear(layer, packed if can_free else layer.weight.data)
    setattr(parent, name, made)
    if can_free:
        for place, attribute, embedding in embeddings:
            assert isinstance(embedding, nn.Embedding)
            assert rows is not None
            setattr(place, attribute, PackedEmbedding(embedding, packed, rows))
        layer.weight.data = layer.weight.data.new_empty(0)
    return made


def _can_read_packed(layer: nn.Module) -> bool:
    return type(layer) is nn.Embedding and layer.max_norm is None and is_free(layer)


def _reorder(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def _packed_rows(packed: torch.Tensor, dense: torch.Tensor) -> _Rows | None:
    """The memory of a packed [N, K] weight as [N / 64, K / p, 64, p], p values to 4 bytes; None: that is not it."""
    num_rows, width = dense.shape
    pair = 4 // dense.itemsize
    num_bytes = torch.ops.mkldnn._nbytes(packed)
    blocks = -(-num_rows // _LANES)
    if num_bytes % (blocks * _LANES * 4):
        return None
    memory = (ctypes.c_char * num_bytes).from_address(torch.ops.mkldnn.data_ptr(packed))
    rows: _Rows = np.frombuffer(memory, dtype=f"i{dense.itemsize}").reshape(blocks, -1, _LANES, pair)
    if rows.shape[1] * pair < width:
        return None
    # The layout is oneDNN's secret, so it is not believed but looked at: every lane, over the whole matrix.
    sample = torch.arange(0, num_rows, max(1, num_rows // 1024) | 1)
    found = torch.empty(len(sample), width, dtype=dense.dtype)
    _gather(rows, sample.numpy(), num_rows, _bits(found))
    return rows if torch.equal(found, dense[sample]) else None


def _bits(values: torch.Tensor) -> npt.NDArray[Any]:
    """The same memory as signed integers: numpy knows no bfloat16."""
    bits: npt.NDArray[Any] = values.view(_BITS[values.itemsize]).numpy()
    return bits


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _gather(rows: _Rows, ids: npt.NDArray[np.int64], num_rows: int, out: npt.NDArray[Any]) -> int:
    """Write rows ``ids`` [T] of a packed matrix to ``out`` [T, K]; -1, or where the first id outside [0, N) stands."""
    num_lanes, pair = rows.shape[2:]
    for place, index in enumerate(ids):
        if index < 0 or index >= num_rows:
            return int(place)
        block, lane = index // num_lanes, index % num_lanes
        for column in range(out.shape[1]):
            out[place, column] = rows[block, column // pair, lane, column % pair]
    return -1
