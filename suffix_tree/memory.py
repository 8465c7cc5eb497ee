"""Memory of the indexes: reserved address ranges, and kernels that read arrays by address.

Numba spends 50-100 ns per array argument of a call. The kernels of this package therefore take one int64 header whose
slots hold addresses, and view the arrays inside (``int32_at``, ``float32_at``).

A reserved array has its final address from the start and costs no memory until it is touched, so an index grows
without copying, without a pause, and without an address that changes under a reader.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, config, njit, types
from numba.extending import intrinsic

__all__ = [
    "SOURCES_DIGEST",
    "Int32Array",
    "Int64Array",
    "address_of",
    "float32_at",
    "int32_at",
    "int64_at",
    "kernel",
    "overlay_file",
    "prefetch",
    "reserve_int32",
]

Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
_Function = TypeVar("_Function", bound=Callable[..., Any])
_SPAN = 1 << 30  # nominal length of a view by address: the kernels keep their own bounds
_MAP_FIXED = 0x10  # Linux and macOS; not exported by the mmap module


def _digest() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.iterdir()):
        if file.suffix in (".py", ".npz"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


SOURCES_DIGEST = _digest()  # of this package, its trained tables included


def kernel(function: _Function) -> _Function:
    """Compile a function to machine code that holds no GIL; compiled code is cached on disk.

    Numba keeps cached code while the function's own file is unchanged, though constants and kernels of other files are
    compiled into it. The name under which it is cached therefore carries a digest of all sources of this package.

    With ``NUMBA_DISABLE_JIT=1`` the function stays Python, with hash arithmetic allowed to wrap as in machine code.
    """
    if not config.DISABLE_JIT:
        function.__qualname__ = f"{function.__qualname__}_{SOURCES_DIGEST}"
        compiled: _Function = njit(nogil=True, cache=True, error_model="numpy")(function)
        return compiled

    @functools.wraps(function)
    def wrapping(*arguments: Any) -> Any:
        with np.errstate(over="ignore"):
            return function(*arguments)

    return wrapping  # type: ignore[return-value]


def _python_view(address: int, ctype: Any) -> Any:
    return np.ctypeslib.as_array(ctypes.cast(int(address), ctypes.POINTER(ctype)), shape=(_SPAN,))


if config.DISABLE_JIT:

    def int32_at(address: int) -> Int32Array:
        """The int32 array that begins at ``address``; callable from kernels only."""
        view: Int32Array = _python_view(address, ctypes.c_int32)
        return view

    def float32_at(address: int) -> npt.NDArray[np.float32]:
        """The float32 array that begins at ``address``; callable from kernels only."""
        view: npt.NDArray[np.float32] = _python_view(address, ctypes.c_float)
        return view

    def int64_at(address: int) -> Int64Array:
        """The int64 array that begins at ``address``; callable from kernels only."""
        view: Int64Array = _python_view(address, ctypes.c_int64)
        return view

    def prefetch(address: int) -> None:
        """Ask for the cache line at ``address``; callable from kernels only."""

else:

    def _pointer_intrinsic(item: Any) -> Any:
        @intrinsic  # type: ignore[untyped-decorator]
        def pointer(typing_context: Any, address: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(item)))

            return types.CPointer(item)(address), generate

        return pointer

    _int32_pointer = _pointer_intrinsic(types.int32)
    _int64_pointer = _pointer_intrinsic(types.int64)
    _float32_pointer = _pointer_intrinsic(types.float32)

    @intrinsic  # type: ignore[untyped-decorator]
    def prefetch(typing_context: Any, address: Any) -> Any:
        """Ask for the cache line at ``address``; callable from kernels only."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
            function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
            # To be read, kept in every cache, data.
            builder.call(function, [builder.inttoptr(arguments[0], pointer), number(0), number(3), number(1)])
            return context.get_dummy_value()

        return types.none(types.int64), generate

    @njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
    def int32_at(address: int) -> Int32Array:
        """The int32 array that begins at ``address``; callable from kernels only."""
        return carray(_int32_pointer(address), (_SPAN,))  # type: ignore[no-any-return]

    @njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
    def float32_at(address: int) -> npt.NDArray[np.float32]:
        """The float32 array that begins at ``address``; callable from kernels only."""
        return carray(_float32_pointer(address), (_SPAN,))  # type: ignore[no-any-return]

    @njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
    def int64_at(address: int) -> Int64Array:
        """The int64 array that begins at ``address``; callable from kernels only."""
        return carray(_int64_pointer(address), (_SPAN,))  # type: ignore[no-any-return]


def address_of(array: npt.NDArray[Any]) -> int:
    """Where the array's memory begins. The caller keeps the array alive."""
    return int(array.ctypes.data)


def reserve_int32(num_items: int) -> Int32Array:
    """A zeroed [num_items] int32 array that occupies memory only where it was touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    block = mmap.mmap(-1, max(4 * num_items, mmap.PAGESIZE), flags=flags)
    return np.frombuffer(block, dtype=np.int32, count=num_items)


def overlay_file(array: Int32Array, file_descriptor: int, offset: int, nbytes: int) -> None:
    """Map ``nbytes`` of a file over the beginning of a reserved array, copy on write.

    Nothing is read until it is used, and writes never reach the file.

    Args:
        array: from ``reserve_int32``, at least ``nbytes`` rounded up to a memory page long.
        file_descriptor: open for reading.
        offset: where the section begins in the file, a multiple of the memory page size.
        nbytes: how much to map.

    Raises:
        OSError: the system refuses the mapping.
    """
    if nbytes == 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    address = address_of(array)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    got = libc.mmap(address, nbytes, protection, mmap.MAP_PRIVATE | _MAP_FIXED, file_descriptor, offset)
    if got != address:
        raise OSError(ctypes.get_errno(), f"cannot map {nbytes} bytes of the file at offset {offset}")
