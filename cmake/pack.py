"""Packs each file's machine code into a container that NVIDIA's tools list, and writes the table of kernels in C++.

    python pack.py --output images.cpp x.80.cubin x.90.cubin y.80.cubin ... --ptx x.90.ptx y.90.ptx ...

Names are <source>.<architecture>.<cubin or ptx>. A container is a fatbin without compression: a header, then each piece
of machine code or PTX behind a header of its own. `cuobjdump` finds it in the section .nv_fatbin; the driver is
handed the one piece that fits the GPU, so that no driver has to know the container. Standard library only.
"""

from __future__ import annotations

import argparse
import re
import struct
import sys
from pathlib import Path

MAGIC = 0xBA55ED50
KIND_PTX, KIND_ELF = 1, 2
_HEADER = struct.Struct("<IHHQ")  # magic, version, header bytes, bytes behind it
# kind, version, header bytes, payload bytes, compressed bytes, offset of options, minor, major, architecture, offset
# and length of a name, flags, reserved, bytes once decompressed
_ENTRY = struct.Struct("<HHIQIIHHIIIQQQ")
_FLAGS = 0x11  # 64 bits, Linux

_SOURCE = """\
// Written by cmake/pack.py. Names of files are relative to the build folder.
#include "driver/images.h"

asm(R"(
  .section .nv_fatbin, "a"
{sections}
  .previous
)");

{declarations}

namespace nsa_sel {{
const KernelImage kKernelImages[] = {{
{kernels}
}};
const int kNumKernelImages = {number};
}}  // namespace nsa_sel
"""
_SECTION = """\
  .balign 8
  .globl {symbol}
  .hidden {symbol}
{symbol}:
  .incbin "{path}\""""
_DECLARATION = 'extern "C" __attribute__((visibility("hidden"))) const unsigned char {symbol}[];'


def entry(kind: int, architecture: int, code: bytes) -> bytes:
    """Return one piece with its header."""
    options = b""
    if kind == KIND_PTX:
        # Where the options of the compilation stand, from the entry's start, and an empty text there.
        options = struct.pack("<QQ", _ENTRY.size + 8, 0)
        major, minor = map(int, re.search(rb"\.version (\d+)\.(\d+)", code).groups())  # type: ignore[union-attr]
        code = code.rstrip(b"\0") + b"\0"
    else:
        major, minor = 1, code[8]  # the ABI version of the ELF header
    code += bytes(-len(code) % 8)
    header = _ENTRY.pack(
        kind, 0x101, _ENTRY.size + len(options), len(code), 0, _ENTRY.size if options else 0,
        minor, major, architecture, 0, 0, _FLAGS, 0, 0,
    )  # fmt: skip
    return header + options + code


def container(pieces: list[bytes]) -> bytes:
    """Return a container of `entry`s."""
    body = b"".join(pieces)
    return _HEADER.pack(MAGIC, 1, _HEADER.size, len(body)) + body


def kernels_of(ptx: bytes) -> list[str]:
    """Return the names of the kernels that PTX defines."""
    return [name.decode() for name in re.findall(rb"^\s*(?:\.visible\s+)?\.entry\s+(\w+)\s*\(", ptx, re.MULTILINE)]


def table(containers: list[Path], kernels: list[tuple[str, int]]) -> str:
    """Return the C++ source: the containers as a section, and which kernel is in which."""
    symbols = [f"nsa_sel_container_{number}" for number in range(len(containers))]
    paired = zip(symbols, containers, strict=True)
    return _SOURCE.format(
        sections="\n".join(_SECTION.format(symbol=symbol, path=path.as_posix()) for symbol, path in paired),
        declarations="\n".join(_DECLARATION.format(symbol=symbol) for symbol in symbols),
        kernels="\n".join(f'    {{"{name}", {symbols[number]}}},' for name, number in kernels),
        number=len(kernels),
    )


def main() -> None:
    """Write `images.cpp` and the containers beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cubins", nargs="+", type=Path)
    parser.add_argument("--ptx", nargs="*", default=[], type=Path)
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    pieces: dict[str, list[bytes]] = {}
    kernels: list[tuple[str, int]] = []
    for path in [*arguments.cubins, *arguments.ptx]:
        source, architecture, kind = path.name.rsplit(".", 2)
        code = path.read_bytes()
        is_ptx = kind == "ptx"
        pieces.setdefault(source, []).append(entry(KIND_PTX if is_ptx else KIND_ELF, int(architecture), code))
        if is_ptx:
            kernels += [(name, list(pieces).index(source)) for name in kernels_of(code)]
    if not kernels:
        sys.exit("pack.py: expected PTX that defines kernels, got none")
    written = []
    for source, parts in pieces.items():
        target = arguments.output.with_name(f"{source}.fatbin")
        target.write_bytes(container(parts))
        written.append(target)
    arguments.output.write_text(table(written, kernels), encoding="utf-8")


if __name__ == "__main__":
    main()
