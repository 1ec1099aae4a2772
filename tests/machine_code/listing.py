"""From machine code to a program: nvdisasm's listing, every branch's address, every instruction's source function."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_FRAME = re.compile(r'^\s*//## File "(.*?)", line (\d+)')
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_SECOND_WORD = re.compile(r"^\s+/\* (0x[0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^([.$\w]+):$")
_REFERENCE = re.compile(r"`\((.*?)\)")
# Functions that only call others by turns: what they call is a stage of its own.
_IS_FRAME = re.compile(r"(_kernel|\.run\w*|\.process\w*|\.Consumer|\.launch\w*)$")
_NAME = re.compile(r"(operator\(\)|\w+)\s*\(")


@dataclass(frozen=True)
class Line:
    """One instruction: its address, the high half of its 128 bits, text, and the functions it was inlined through."""

    address: int
    high: int
    text: str
    stage: str  # the source function that it belongs to, as "loader.copy_by_threads"; empty without line information


@dataclass(frozen=True)
class Kernel:
    """A kernel's instructions and the banks of constants that the compiler laid out for it."""

    symbol: str
    lines: list[Line]
    banks: dict[int, bytes]


@functools.cache
def nvdisasm() -> Path:
    """Return NVIDIA's disassembler: of the wheel nvidia-cuda-nvdisasm (extra `test`), or of a CUDA toolkit.

    Raises:
        FileNotFoundError: neither is installed.
    """
    packages = [Path(p) for p in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *map(str, _site())}]
    for package in packages:
        for folder in ("cu13", "cu12", "cuda_nvdisasm"):
            if (found := package / "nvidia" / folder / "bin" / "nvdisasm").exists():
                return found
    if on_path := shutil.which("nvdisasm"):
        return Path(on_path)
    raise FileNotFoundError("nvdisasm: expected the wheel nvidia-cuda-nvdisasm or a CUDA toolkit, got neither")


def _site() -> list[Path]:
    import sys

    return [Path(p) for p in sys.path if p.endswith("site-packages")]


def _run(cubin: Path, *flags: str) -> str:
    command = [str(nvdisasm()), *flags, str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{command}: {result.stderr[:2000]}")
    return result.stdout


@functools.lru_cache(maxsize=4)
def _sections(cubin: Path, with_lines: bool) -> dict[str, str]:
    text = _run(cubin, "-hex", *(["-gi"] if with_lines else []))
    parts = re.split(r"^//-+ (?=\.)", text, flags=re.MULTILINE)[1:]
    return {part.split(maxsplit=1)[0]: part for part in parts}


def symbols(cubin: Path) -> list[str]:
    """Return the kernels that a file of machine code holds, by the names of its sections: each has one of its own."""
    found = re.findall(rb"\0\.text\.(\w+)(?=\0)", cubin.read_bytes())
    return list(dict.fromkeys(name.decode() for name in found))


def kernel(cubin: Path, symbol: str, with_lines: bool = False) -> Kernel:
    """Return one kernel of a file, with the source functions that its instructions come from if asked for.

    Raises:
        ValueError: the file has no such kernel.
    """
    sections = _sections(cubin, with_lines)
    if f".text.{symbol}" not in sections:
        found = [name.removeprefix(".text.") for name in sections if name.startswith(".text.")]
        raise ValueError(f"{cubin.name}: expected kernel {symbol}, got {found}")
    banks = {}
    for name, part in sections.items():
        if (match := re.fullmatch(rf"\.nv\.constant(\d+)\.{symbol}", name)) and match[1] != "0":  # 0: parameters
            banks[int(match[1])] = _data(part)
    return Kernel(symbol, _parse(symbol, sections[f".text.{symbol}"]), banks)


def _data(section: str) -> bytes:
    data = bytearray()
    for kind, values in re.findall(r"\.(byte|short|word|dword|zero|align)\s+([\w, -]+)", section):
        if kind == "zero":
            data += bytes(int(values, 0))
        elif kind != "align":
            size = {"byte": 1, "short": 2, "word": 4, "dword": 8}[kind]
            data += b"".join((int(x, 0) % 256**size).to_bytes(size, "little") for x in values.split(","))
    return bytes(data)


def _parse(symbol: str, section: str) -> list[Line]:
    rows: list[tuple[int, int, str, tuple[tuple[str, int], ...]]] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    frames: list[tuple[str, int]] = []
    fresh = True
    lines = section.split("\n")
    for number, line in enumerate(lines):
        if line.startswith("//----"):
            break
        if match := _INSTRUCTION.match(line):
            second = _SECOND_WORD.match(lines[number + 1])
            if second is None:
                raise ValueError(f"{symbol}: no second word behind {line.strip()}")
            address = int(match[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending, fresh = [], True
            rows.append((address, int(second[1], 16), match[2], tuple(frames)))
        elif match := _FRAME.match(line):
            frames = [] if fresh else frames
            fresh = False
            frames.append((match[1], int(match[2])))
        elif match := _LABEL.match(line.strip()):
            pending.append(match[1])
            if match[1].startswith("$__internal"):  # a function of the compiler's own, without source lines
                frames = []
    labels[symbol] = 0
    return [Line(address, high, _resolve(text, labels), _stage(where)) for address, high, text, where in rows]


def _resolve(text: str, labels: dict[str, int]) -> str:
    """Put addresses in the place of labels; `RET R8 label` gets the comma that every other pair of operands has."""
    return _REFERENCE.sub(lambda m: hex(labels[m[1]]), re.sub(r"(R\d+) `", r"\1, `", text))


@functools.cache
def _functions_of(path: str) -> Sequence[tuple[int, str]]:
    """Return (first line, name) of the functions of a source file of the kernel; none of other people's headers."""
    if not re.search(r"/cuda/[\w/]+\.cuh?$", path) or path.startswith("/usr/") or not Path(path).exists():
        return ()
    found, pending = [], False
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if re.search(r"__device__|__global__", line) and not line.lstrip().startswith("//"):
            pending = True
        match = _NAME.search(re.sub(r"__launch_bounds__\([^()]*\)|__grid_constant__", "", line)) if pending else None
        if match:
            found.append((number, match[1]))
            pending = False
    return found


def _function(path: str, line: int) -> str:
    name = next((name for first, name in reversed(_functions_of(path)) if first <= line), "")
    return f"{Path(path).stem}.{name}" if name else ""


@functools.cache
def _stage(frames: tuple[tuple[str, int], ...]) -> str:
    """Return the function that an instruction counts for: the outermost one below the kernel and its roles' loops."""
    chain = [name for frame in reversed(frames) if (name := _function(*frame))]
    inner = [name for name in chain if not _IS_FRAME.search(name)]
    return inner[0] if inner else chain[-1] if chain else ""
