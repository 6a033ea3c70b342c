"""What the compiler made of a kernel: registers, spills, and the instructions of its main loop.

Registers and local memory are read from the compiled file itself. Instructions need a disassembler, which comes with
Triton: without one they are not told.
"""

from __future__ import annotations

import functools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

# Attributes in the section .nv.info of a compiled file, each with the number of a function and a value.
ATTRIBUTES, WITH_VALUE, REGISTERS, FRAME = ".nv.info", 0x04, 0x2F, 0x11
# Matrix instructions: of Ampere, Ada and consumer Blackwell, and of Hopper.
MATRIX = ("HMMA", "HGMMA", "WGMMA")
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]*?)\s*;")


class Resources(NamedTuple):
    """What one thread takes: ``registers``, and bytes of ``local`` memory, into which registers are spilled."""

    registers: int
    local: int


class Loop(NamedTuple):
    """How often each instruction, by its name without suffixes, stands in a loop."""

    counts: Counter[str]

    @property
    def matrix(self) -> int:
        """Matrix instructions."""
        return sum(self.counts[name] for name in MATRIX)

    @property
    def total(self) -> int:
        """Instructions."""
        return self.counts.total()

    @property
    def barriers(self) -> int:
        """Waits of all threads of a block for each other."""
        return self.counts["BAR"]


def resources(binary: bytes) -> Resources:
    """Of the one kernel in a compiled file (ELF)."""
    found = {}
    data, place = _section(binary, ATTRIBUTES), 0
    while place < len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, place)
        place += 4
        if form == WITH_VALUE:
            found[attribute] = struct.unpack_from("<I", data, place + 4)[0] if size == 8 else None
            place += size
    return Resources(found[REGISTERS], found[FRAME])


def _section(binary: bytes, name: str) -> bytes:
    """The content of a section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", binary, 0x28)
    size, count, names = struct.unpack_from("<HHH", binary, 0x3A)
    # Of a header: where its name is in the section of names; where the content begins, and how long it is.
    headers = [struct.unpack_from("<I20xQQ", binary, table + i * size) for i in range(count)]
    for start, offset, length in headers:
        at = headers[names][1] + start
        if binary[at : binary.index(b"\0", at)].decode() == name:
            return binary[offset : offset + length]
    raise ValueError(f"no section {name}")


@functools.cache
def disassembler() -> str | None:
    """Where the disassembler is; None if there is none."""
    try:
        return triton.knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return None


def loops(binary: bytes) -> list[Loop]:
    """All loops of a compiled file, in order. Needs the disassembler."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        command = [disassembler(), "-sass", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = [(int(match[1], 16), match[2]) for match in map(INSTRUCTION.match, text.splitlines()) if match]
    found = []
    for address, instruction in code:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            inside = (text for at, text in code if int(target[1], 16) <= at <= address)
            found.append(Loop(Counter(re.split(r"[.\s]", text)[0] for text in inside)))
    return found


def main_loop(found: list[Loop]) -> Loop | None:
    """Of a kernel's loops, the one with the most matrix instructions; None if no loop has any."""
    best = max(found, key=lambda loop: loop.matrix, default=None)
    return best if best is not None and best.matrix else None
