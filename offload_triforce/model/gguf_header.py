"""The header of a GGUF file: what it says of the model, and how long the file has to be.

Read before transformers does: a download that broke off would end in whatever the reader stumbles over first.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from offload_triforce.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Kinds of values, by their numbers: struct's letters. Then texts and arrays.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# Weights of a decoder layer; those with two dimensions are linear layers', but for the router of experts.
_LINEAR = re.compile(r"blk\.\d+\.(?!ffn_gate_inp\b).*\.weight")


@dataclass(frozen=True)
class GGUFHeader:
    """``values``: single numbers and texts by key; arrays are left out. ``needed``: bytes of a whole file.

    ``parameters``: numbers in all tensors; ``packable``: of these, in the weights of linear layers, which a
    quantisation packs; ``head``: in an output embedding of the model's own.
    """

    values: dict[str, Any]
    needed: int
    parameters: int
    packable: int
    head: int


def read_header(path: Path) -> GGUFHeader:
    """Read a file's header, and check that the file is as long as it says.

    Raises:
        InputError: it is no GGUF file, of a version that nobody reads, damaged, or incomplete: by how much.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) != MAGIC:
                raise InputError(f"{path} is not a GGUF file: {_what_else(path)}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Reader(data, path).header()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if size < header.needed:
        raise InputError(
            f"{path} is incomplete: {size:,} of {header.needed:,} bytes, {header.needed - size:,} too few; get it again"
        )
    return header


def _what_else(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, which `git lfs pull` replaces with the model"
    return f"it starts with {start[:16]!r}" if start else "it is empty"


class _Tensor(NamedTuple):
    """``elements``: numbers in it. ``end``: where it ends, in bytes from where the first tensor begins."""

    name: str
    dimensions: int
    elements: int
    end: int


class _Reader:
    """Walks through a header."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at = data, path, 4

    def header(self) -> GGUFHeader:
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = f"big-endian, version {swapped}" if swapped in VERSIONS else f"of version {version}"
            raise InputError(f"{self._path} is a GGUF file {kind}; convert the model to version 3, little-endian")
        tensors, values = self._number("Q"), self._number("Q")
        found = {}
        for _ in range(values):
            key = self._text()
            value = self._value(self._number("I"))
            if value is not None:
                found[key] = value
        tensors = [self._tensor() for _ in range(tensors)]
        alignment = found.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            self._damaged(f"its alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        needed = start + max((tensor.end for tensor in tensors), default=0)
        packable = sum(
            tensor.elements for tensor in tensors if _LINEAR.fullmatch(tensor.name) and tensor.dimensions == 2
        )
        head = sum(tensor.elements for tensor in tensors if tensor.name == "output.weight")
        return GGUFHeader(found, needed, sum(tensor.elements for tensor in tensors), packable, head)

    def _tensor(self) -> _Tensor:
        name = self._text()
        dimensions = self._number("I")
        if dimensions > 8:
            self._damaged(f"tensor {name!r} has {dimensions:,} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= self._number("Q")
        kind, offset = self._number("I"), self._number("Q")
        if kind not in GGMLQuantizationType._value2member_map_:
            return _Tensor(name, dimensions, elements, offset)  # newer than the gguf package, which will say so
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return _Tensor(name, dimensions, elements, offset + elements // block * size)

    def _value(self, kind: int) -> Any:
        """A number or a text; None of an array."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            self._damaged(f"it holds a value of the unknown kind {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _TEXT:
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            self._damaged(f"it holds an array of the unknown kind {inner}")
        return None

    def _number(self, letter: str) -> Any:
        size = struct.calcsize(letter)
        self._skip(size)
        return struct.unpack_from(f"<{letter}", self._data, self._at - size)[0]

    def _text(self) -> str:
        length = self._number("Q")
        self._skip(length)
        return self._data[self._at - length : self._at].decode("utf-8", errors="replace")

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise InputError(
                f"{self._path} is incomplete or damaged: its header goes on to byte {self._at:,}, but there are "
                f"{len(self._data):,}; get it again"
            )

    def _damaged(self, what: str) -> None:
        raise InputError(f"{self._path} is damaged: {what}; get it again")
