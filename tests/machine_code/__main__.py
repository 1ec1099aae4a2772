"""Prints the clock's figures, all of them a model.

To judge another compile of the kernel, give its machine code: `python -m tests.machine_code --arch sm_90 --cubin FILE`
where FILE holds the NSA instance alone (bf16, 192/128, head tile 16) with line information, as by
`nvcc -cubin -arch=sm_90 -lineinfo -std=c++17 -Icpp -Icuda x.cu` or cmake/nvrtc.py makes; the parameters are this
checkout's. Stages are found by the names of source functions (`STAGES` in tests/machine_code/clock.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tests.machine_code import bandwidth, clock


def main(argv: Sequence[str] | None = None) -> None:
    """Print the stages of each instruction set as a table, or as one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.machine_code", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=["sm_80", "sm_90"], action="append", help="default: both")
    parser.add_argument("--cubin", type=Path, help="machine code of one decode kernel, in place of this checkout's")
    parser.add_argument("--functions", action="store_true", help="every source function of one whole row, not stages")
    parser.add_argument("--bandwidth", action="store_true", help="shares of the memory bandwidth, by batch and GPU")
    parser.add_argument("--float8", action="store_true", help="stages and shares with a float8 cache")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args(argv)
    if arguments.bandwidth:
        bandwidth.main(arguments.float8)
        return
    archs = arguments.arch or ["sm_90", "sm_80"]
    found = {}
    for arch in archs:
        if arguments.functions:
            functions(arch, arguments.cubin)
            continue
        found[arch] = {
            name: round(value, 1) for name, value in clock.measure(arch, arguments.cubin, arguments.float8).items()
        }
    if found:
        print(
            "model, clocks: NSA shape (192/128), h = 16, bf16, blocks of 64"
            + (", float8 cache" if arguments.float8 else "")
        )
        print(f"{'stage':<16}" + "".join(f"{arch:>10}" for arch in found))
        for key in clock.KEYS:
            print(f"{key:<16}" + "".join(f"{figures[key]:>10.0f}" for figures in found.values()))
    if arguments.json:
        print(json.dumps(found))


def functions(arch: str, cubin: Path | None) -> None:
    """Print the clocks of every source function over one whole row of 1,024 tokens, all warps at work."""
    run = clock.Problem(arch=arch).run(cubin)
    print(f"model, {arch}: one whole row of 1,024 tokens, {run.clocks} clocks, {run.decode.instructions} instructions")
    for name, time in sorted(run.decode.marks.items(), key=lambda item: item[1]):
        print(f"  first {name}: {time:.0f}")
    print(f"{'issuing':>9}{'stalled':>9}{'asleep':>9}{'instructions':>14}  source function (over all warps)")
    for name, s in sorted(run.decode.stages.items(), key=lambda item: -item[1].busy - item[1].stalled):
        print(f"{s.busy:9.0f}{s.stalled:9.0f}{s.slept:9.0f}{s.issued:14}  {name}")


if __name__ == "__main__":
    main()
