"""A file of named arrays: versioned, checksummed, ready to be mapped into memory, written all or nothing.

Layout: a head of 32 bytes (magic, version, checksum and length of the manifest), the manifest in JSON, then the arrays,
each at a multiple of the memory page size. A new file is written beside the old one and renamed over it, so whatever
stops a save, a reader finds either the old file or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["VERSION", "ArrayFile", "DamagedFileError", "open_arrays", "save_arrays"]

VERSION = 1
_MAGIC = b"specdecR"
_HEAD = struct.Struct("<8sIIQ8x")
_CHUNK = 1 << 22


class DamagedFileError(ValueError):
    """The file is not one of ours, of another version, cut short, or its checksums do not match."""


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """An open file of arrays.

    Args:
        file_descriptor: open for reading while the file is.
        meta: what was saved beside the arrays.
        sections: name -> (offset, bytes, dtype, shape).
    """

    file_descriptor: int
    meta: Mapping[str, Any]
    sections: Mapping[str, tuple[int, int, str, tuple[int, ...]]]

    def read(self, name: str) -> npt.NDArray[Any]:
        """A copy of an array."""
        offset, nbytes, dtype, shape = self.sections[name]
        return np.frombuffer(os.pread(self.file_descriptor, nbytes, offset), dtype=dtype).reshape(shape).copy()


def _aligned(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_arrays(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a file of arrays in place of ``path``.

    Args:
        path: the file; its directory must exist.
        meta: anything that JSON can hold.
        arrays: by name; they must not change meanwhile.

    Raises:
        OSError: the file cannot be written, or another process is writing it. The old file is untouched.
    """
    manifest, head_size = _manifest(meta, arrays)
    part = path.with_name(path.name + ".part")
    with part.open("ab+") as file:  # not truncated yet: another process may hold it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"another process is saving {path}") from error
        try:
            file.truncate(0)
            file.write(_HEAD.pack(_MAGIC, VERSION, zlib.crc32(manifest), len(manifest)) + manifest)
            size = _HEAD.size + len(manifest)
            file.write(bytes(head_size - size))
            for array in arrays.values():
                data = np.ascontiguousarray(array)
                file.write(data.tobytes() if data.nbytes < _CHUNK else data.data.cast("B"))
                file.write(bytes(_aligned(data.nbytes) - data.nbytes))
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    _sync_directory(path.parent)


def _manifest(meta: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[bytes, int]:
    """The manifest and the bytes of head and manifest together, rounded up to whole memory pages."""
    sections: dict[str, list[Any]] = {}
    start = 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array)
        sections[name] = [
            start,
            data.nbytes,
            data.dtype.str,
            list(data.shape),
            zlib.crc32(data.data.cast("B") if data.size else b""),
        ]
        start += _aligned(data.nbytes)
    # Offsets count from the end of the head, whose size depends on the manifest.
    manifest = json.dumps({"meta": meta, "sections": sections}).encode()
    return manifest, _aligned(_HEAD.size + len(manifest))


def _require(ok: bool, path: Path, what: str) -> None:
    if not ok:
        raise DamagedFileError(f"{path} {what}")


@contextlib.contextmanager
def open_arrays(path: Path) -> Iterator[ArrayFile]:
    """Open a file of arrays after checking all of it.

    Raises:
        DamagedFileError: it is damaged; the message says how.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        head = os.pread(descriptor, _HEAD.size, 0)
        _require(len(head) == _HEAD.size, path, f"is cut short: {size} bytes")
        magic, version, checksum, length = _HEAD.unpack(head)
        _require(magic == _MAGIC, path, "is not a retrieval store")
        _require(version == VERSION, path, f"has version {version}, this program reads version {VERSION}")
        _require(_HEAD.size + length <= size, path, "is cut short inside its manifest")
        manifest = os.pread(descriptor, length, _HEAD.size)
        _require(zlib.crc32(manifest) == checksum, path, "has a damaged manifest: its checksum differs")
        content = json.loads(manifest)
        base = _aligned(_HEAD.size + length)
        sections = {}
        for name, (start, nbytes, dtype, shape, expected) in content["sections"].items():
            offset = base + start
            _require(offset + _aligned(nbytes) <= size, path, f"is cut short: array {name!r} is not whole")
            _require(_checksum(descriptor, offset, nbytes) == expected, path, f"is damaged: checksum of array {name!r}")
            sections[name] = (offset, nbytes, dtype, tuple(shape))
        yield ArrayFile(descriptor, content["meta"], sections)
    finally:
        os.close(descriptor)


def _checksum(descriptor: int, offset: int, nbytes: int) -> int:
    value = 0
    for start in range(0, nbytes, _CHUNK):
        value = zlib.crc32(os.pread(descriptor, min(_CHUNK, nbytes - start), offset + start), value)
    return value
