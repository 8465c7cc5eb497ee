"""Compiles every Triton kernel ahead of time, without a GPU, and says what each variant needs of one.

    python -m specdec.bench.kernel_build --json bench/results/kernel_build.json

Registers, stack and shared memory are those of the machine code: read by ``cuobjdump``, or from AMD's metadata. A
kernel whose registers do not suffice puts some into the stack, so any stack is a spill, and the exit status is then 1.
``TRITON_INTERPRET`` must not be set: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specdec.bench.measure import write_json
from specdec.kernels import (
    distillation,
    kv_commit,
    strict_products,
    top_k,
    tree_attention,
    tree_attention_triton,
    truncation,
    verify,
)
from specdec.kernels.distillation_reference import LOSSES

__all__ = ["ARCHITECTURES", "Usage", "Variant", "build", "main", "variants"]

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")  # NVIDIA Ampere, Hopper, Blackwell; AMD MI300
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with all that the compiler must know.

    Args:
        name: of the variant.
        kernel: the jitted function.
        types: of its arguments that are no constants, by name.
        constants: its constexpr arguments.
        options: of the launch.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    """What one variant needs on one architecture: registers per thread, bytes of stack and of shared memory."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    shared_bytes: int


def variants() -> list[Variant]:
    """Every kernel in its default configurations."""
    return [*_attention(), *_others()]


def _attention() -> Iterator[Variant]:
    kernel = tree_attention_triton.attend
    strict = tree_attention._STRICT_SPLIT
    cases: list[tuple[str, torch.dtype, int, int, int, dict[str, Any]]] = [
        ("bf16, 4 x 128", torch.bfloat16, 4, 128, 128, {}),
        ("fp16, 4 x 128", torch.float16, 4, 128, 128, {}),
        ("bf16, 7 x 64", torch.bfloat16, 7, 64, 64, {}),
        ("bf16, 1 x 80", torch.bfloat16, 1, 80, 80, {}),
        ("bf16, 2 x 256", torch.bfloat16, 2, 256, 256, {}),
        ("bf16, 1 x 192/128", torch.bfloat16, 1, 192, 128, {}),
        ("bf16, 4 x 128, window", torch.bfloat16, 4, 128, 128, {"WINDOW": True}),
        ("bf16, 4 x 128, chunks", torch.bfloat16, 4, 128, 128, {"CHUNK": True}),
        ("bf16, 4 x 128, soft-cap, window", torch.bfloat16, 4, 128, 128, {"CAP": True, "WINDOW": True}),
        ("bf16, 8 x 64, sinks, window", torch.bfloat16, 8, 64, 64, {"SINK": True, "WINDOW": True}),
        ("fp32, 4 x 64", torch.float32, 4, 64, 64, {}),
        ("bf16, 4 x 128, large trees", torch.bfloat16, 4, 128, 128, {"queries": 64}),
        ("bf16, 7 x 64, large trees, window", torch.bfloat16, 7, 64, 64, {"queries": 64, "WINDOW": True}),
        ("bf16, 4 x 128, strict", torch.bfloat16, 4, 128, 128, {"SPLIT_KEYS": strict}),
        ("bf16, 4 x 128, strict, window", torch.bfloat16, 4, 128, 128, {"SPLIT_KEYS": strict, "WINDOW": True}),
        ("fp32, 4 x 64, strict", torch.float32, 4, 64, 64, {"SPLIT_KEYS": strict}),
    ]
    for name, dtype, groups, width, value_width, flags in cases:
        shape = tree_attention._tiling(
            groups, width, value_width, dtype, num_queries=flags.pop("queries", 1), is_strict="SPLIT_KEYS" in flags
        )
        options = {key: shape.pop(key) for key in ("num_warps", "num_stages")}
        defaults = {"RB": 8, "SPLIT_KEYS": 0, **dict.fromkeys(("WINDOW", "CHUNK", "CAP", "SINK"), False)}
        constants = {**defaults, **shape, **flags}
        pointers = dict.fromkeys(("Q", "K", "V"), "*" + _SHORT[dtype])
        types = _types(kernel, constants, {**pointers, **dict.fromkeys(("Part", "Stats", "Sinks"), "*fp32")})
        yield Variant(
            f"tree attention, {name}", kernel, {**types, "scale": "fp32", "softcap": "fp32"}, constants, options
        )
    merge, constants = tree_attention_triton.merge, {"BS": 64, "DV": 128, "BDV": 128}
    types = _types(merge, constants, {"Part": "*fp32", "Stats": "*fp32", "Out": "*bf16"})
    yield Variant("tree attention, merge", merge, types, constants, {"num_warps": 4})


def _others() -> Iterator[Variant]:
    yield from _verify()
    splits = {"SPLITS": 32}
    yield Variant(
        "verify, merge", verify._reduce, _types(verify._reduce, splits, {"Best": "*fp32"}), splits, {"num_warps": 1}
    )
    yield Variant("verify, walk", verify._walk, _types(verify._walk, {}, {"Kept": "*i8"}), {}, {"num_warps": 1})
    block = {"BLOCK": 256}
    types = _types(kv_commit._kv_commit, block, {"Kept": "*i8"})
    yield Variant("kv commit, 256 slots", kv_commit._kv_commit, types, block, {"num_warps": 4})
    floats = {"Logits": "*bf16", "Values": "*fp32", "Sums": "*fp32"}
    find = {"K": 16, "BLOCK": top_k._BLOCK}
    yield Variant("top-k, blocks", top_k._block_top_k, _types(top_k._block_top_k, find, floats), find, {"num_warps": 8})
    merge = {"K": 16, "SPLITS": 64}
    types = _types(top_k._merge_top_k, merge, {**floats, "Ids": "*i64", "LogProbs": "*fp32"})
    yield Variant("top-k, merge", top_k._merge_top_k, types, merge, {"num_warps": 4})
    for dtype, columns in ((torch.bfloat16, 4096), (torch.bfloat16, 14_336), (torch.float32, 4096)):
        shape = strict_products._tiling(columns, 4096, dtype)
        options = {key: shape.pop(key) for key in ("num_warps", "num_stages")}
        constants = {**shape, "BIAS": True}
        types = _types(
            strict_products._matmul, constants, dict.fromkeys(("X", "W", "Bias", "Out"), "*" + _SHORT[dtype])
        )
        # The weight of a linear layer: its second stride is 1, as torch's launcher finds out.
        types.pop("stride_k")
        constants["stride_k"] = 1
        yield Variant(
            f"strict product, {_SHORT[dtype]}, {columns} columns", strict_products._matmul, types, constants, options
        )
    types = _types(strict_products._mean, {"BLOCK": strict_products._BLOCK}, {"X": "*fp32", "Out": "*fp32"})
    yield Variant("strict mean", strict_products._mean, types, {"BLOCK": strict_products._BLOCK}, {"num_warps": 4})
    for kind, loss in enumerate(LOSSES):
        constants = {"KIND": kind, "BLOCK": distillation._BLOCK}
        pointers = {"Student": "*bf16", "Teacher": "*bf16", "Losses": "*fp32", "Gradient": "*bf16"}
        types = _types(distillation._distill, constants, pointers)
        yield Variant(f"distillation, {loss}", distillation._distill, types, constants, {"num_warps": 8})


def _verify() -> Iterator[Variant]:
    laws = {"Nodes": "*i64", "Numbers": "*fp64", "Addresses": "*i64", "Floors": "*fp32", "Totals": "*i64"}
    for name, flags in (
        ("bf16", {"TABLES": False, "FLOORS": False}),
        ("fp32", {"TABLES": False, "FLOORS": False}),
        ("bf16, penalties, top-p", {"TABLES": True, "FLOORS": True}),
    ):
        draw = {"SPLIT": verify._SPLIT, "BLOCK": verify._BLOCK, "RECIPROCAL": True, **flags}
        types = _types(verify._draw, draw, {**laws, "Logits": "*" + name[:4], "Best": "*fp32"})
        yield Variant(f"verify, draw, {name}", verify._draw, types, draw, {"num_warps": 4, "enable_fp_fusion": False})
    for name, kernel in (("floors", truncation.find_floors), ("nucleus", truncation.keep_in_nucleus)):
        for has_tables in (False, True):
            constants = {"BLOCK": verify._ROW_BLOCK, "TABLES": has_tables, "RECIPROCAL": True}
            yield Variant(
                f"verify, {name}{', penalties' if has_tables else ''}", kernel,
                _types(kernel, constants, {**laws, "Logits": "*bf16"}), constants,
                {"num_warps": 8, "enable_fp_fusion": False},
            )  # fmt: skip


def _types(kernel: Any, constants: dict[str, Any], known: dict[str, str]) -> dict[str, str]:
    """Types of all arguments: int32 pointers and numbers where nothing else is said; a capital is a pointer."""
    names = [name for name in kernel.arg_names if name not in constants]
    return {name: known.get(name, "*i32" if name[0].isupper() else "i32") for name in names}


def build(variant: Variant, architecture: str) -> Usage:
    """Compile one variant for one of ``ARCHITECTURES``."""
    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    # As at run time: pointers of torch are aligned, and so are the strides of whole heads.
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*")
        or (signature[name] != "constexpr" and name.startswith(("sq", "sk", "sv", "stride_", "width")))
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    is_amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if is_amd else GPUTarget("cuda", int(architecture[3:]), 32)
    constants, options = dict(variant.constants), dict(variant.options)
    if is_amd and "PRECISION" in constants:
        constants["PRECISION"] = "ieee"  # as the launcher does there
    if is_amd and variant.kernel is tree_attention_triton.attend and constants["BM"] > tree_attention.AMD_ROWS:
        constants["BM"], options["num_warps"] = tree_attention.AMD_ROWS, 4  # likewise
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=target, options=options)
    registers, stack = _amd_usage(built.asm["amdgcn"]) if is_amd else _nvidia_usage(built.asm["cubin"])
    return Usage(variant.name, architecture, registers, stack, int(built.metadata.shared))


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers of a thread, and bytes of them that it spills, from the metadata at the end of the assembly.

    Scalar registers spill into vector registers, which the count of those contains.
    """
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly))
    return int(found["vgpr_count"]), 4 * int(found["vgpr_spill_count"])


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", text)}
    return found["REG"], found["STACK"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Build everything; exit status 1 if something spills."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="variants whose name begins so")
    options = parser.parse_args(arguments)
    rows = []
    print(f"{'kernel':50} {'':7} {'registers':>9} {'stack':>6} {'shared':>7}")
    for variant in variants():
        for architecture in options.architectures if variant.name.startswith(options.only) else ():
            row = build(variant, architecture)
            rows.append(row)
            print(
                f"{row.name:50} {row.architecture:7} {row.registers:9} {row.stack_bytes:6} {row.shared_bytes:7}",
                flush=True,
            )
    spilled = [row for row in rows if row.stack_bytes]
    if options.json is not None:
        what = "Triton kernels compiled ahead of time; not run on any GPU"
        write_json(options.json, {"what": what, "rows": [asdict(row) for row in rows]})
    print(f"{len(rows)} built, {len(spilled)} spill")
    return 1 if spilled else 0


if __name__ == "__main__":
    raise SystemExit(main())
