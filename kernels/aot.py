"""Compile every kernel ahead of time, for a GPU that need not be there: ``python -m offload_triforce.kernels.aot``.

It shows that the kernels build for a compute capability, and what the compiler makes of them: registers and spills,
how much shared memory a block takes, and instructions per matrix instruction. RTX cards of the 30, 40 and 50 series
give a block 99 KB, and refuse a kernel that wants more only when it is launched.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from offload_triforce.kernels import machine_code, verify_attention
from offload_triforce.kernels.aot_cases import cases, name_of
from offload_triforce.kernels.launch import OPTIONS, Launch

SHARED_MEMORY = 101376
# What is launched for each tile, or each step over all that is held: only of these it matters how many instructions
# they take, and to disassemble takes longer than to compile most of the others.
COUNTED = ("chunk_scores._score", "packed_attention._update", "verify_attention._update", "wire_codec._decode")


class Compiled(NamedTuple):
    """A kernel that was built.

    Attributes:
        name: of the kernel. parameters: what it was built for.
        registers, local: per thread, the latter in bytes. shared: bytes per block. warps: of a block.
        loop: the instructions of its main loop; None where no loop has matrix instructions, or it is not disassembled.
        longest: instructions of its longest loop; 0 where there is none, or it is not disassembled.
    """

    name: str
    parameters: dict[str, Any]
    registers: int
    local: int
    shared: int
    warps: int
    loop: machine_code.Loop | None
    longest: int

    def line(self, cc: int) -> str:
        """As one line of JSON."""
        fields: dict[str, Any] = {"cc": cc, "name": self.name, **self.parameters, "registers": self.registers}
        fields |= {"local": self.local, "shared": self.shared, "warps": self.warps, "longest": self.longest}
        if self.loop is not None:
            per_matrix = round(self.loop.total / self.loop.matrix, 2)
            fields |= {"matrix": self.loop.matrix, "per_matrix": per_matrix, "barriers": self.loop.barriers}
        return json.dumps(fields)


def compiled(cc: int, extent: str = "usual") -> Iterator[Compiled]:
    """The kernels for compute capability ``cc``: 89 stands for 8.9. ``extent`` as of ``cases``."""
    for case in cases(extent):
        yield build(case.launch, cc, case.parameters, COUNTED)


def build(
    launch: Launch, cc: int, parameters: dict[str, Any] | None = None, counted: tuple[str, ...] = ("",)
) -> Compiled:
    """Compile one launch, and look at what came out. ``counted``: how names begin of those to disassemble."""
    binary = compile_launch(launch, cc)
    code = binary.asm["cubin"]
    name = f"{launch.kernel.__module__.rpartition('.')[2]}.{launch.kernel.__name__}"
    loops = machine_code.loops(code) if name.startswith(counted) and machine_code.disassembler() else []
    shared, warps = binary.metadata.shared, binary.metadata.num_warps
    longest = max((loop.total for loop in loops), default=0)
    resources = machine_code.resources(code)
    return Compiled(name, parameters or {}, *resources, shared, warps, machine_code.main_loop(loops), longest)


def compile_launch(launch: Launch, cc: int) -> Any:
    """Build what this launch on a GPU of compute capability ``cc`` would build."""
    if verify_attention.interpreted():
        raise RuntimeError("Triton's interpreter does not compile: unset TRITON_INTERPRET")
    signature, constants, attributes = {}, {}, {}
    for place, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments, strict=True)):
        kind, hints = _specialise(parameter, value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif hints:
            attributes[place,] = hints
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=launch.options | OPTIONS)


def _specialise(parameter: Any, value: Any) -> tuple[str, list[list[Any]]]:
    """The type of an argument and what is assumed of its value, by the rules of Triton's launcher."""
    aligned = [] if parameter.do_not_specialize_on_alignment else [["tt.divisibility", 16]]
    if parameter.is_constexpr or value is None:
        return "constexpr", []
    if isinstance(value, Tensor):
        return "*" + triton.runtime.jit.type_canonicalisation_dict[name_of(value.dtype)], aligned
    if isinstance(value, float):
        return "fp32", []
    fixed = parameter.do_not_specialize
    if value == 1 and not fixed:
        return "constexpr", []
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), aligned if value % 16 == 0 and not fixed else []


def main() -> None:
    """Print one line of JSON per kernel; fail if one takes more shared memory than a consumer card has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cc", type=int, nargs="+", default=[86, 89, 90, 120], help="compute capabilities")
    extents = ["few", "dims", "usual", "every"]
    parser.add_argument("--extent", choices=extents, default="usual", help="how many variants")
    arguments = parser.parse_args()
    too_large = False
    for cc in arguments.cc:
        for kernel in compiled(cc, arguments.extent):
            print(kernel.line(cc), flush=True)
            too_large |= kernel.shared > SHARED_MEMORY
    sys.exit(int(too_large))


if __name__ == "__main__":
    main()
