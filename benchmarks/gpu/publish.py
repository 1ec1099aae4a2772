"""Bring a run's results home: into benchmarks/results/<gpu>/, and from there into the README's table.

python -m benchmarks.gpu.publish build/gpu/run     copy the results and fill the table
python -m benchmarks.gpu.publish                   fill the table from the results that are there
python -m benchmarks.gpu.publish --check           exit 1 where the table is not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.runner import NOT_MEASURED
from benchmarks.gpu.summary import Rows, over, rows_of, timed, times
from nsa_sel.measure.report.record import slug
from nsa_sel.measure.schema import BASELINES

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
COLUMNS = ("H200", "H100", "A100", "RTX 4090")  # always shown; another GPU gets a column when it has results
NEEDED = ("bench.csv", "decode.csv", "environment.json", "summary.json")
KEPT = (
    *NEEDED, "bench.json", "decode.json", "again.csv", "again.json", "ceilings.csv", "twins.csv", "replays.csv",
    "gpu_tests.csv", "parity.csv", "sanitizer-*.log", "threshold.*", "decision-*.md", "report.md", "*.png",
    "policy.json",
)  # fmt: skip
SHAPES = {
    "nsa-paper-b": "NSA paper's shape (64 heads, G 4, 192/128, 16 blocks of 64), share of the ceiling",
    "minimax-m3-b": "MiniMax-M3's shape (64 heads, G 4, 128/128, 16 blocks of 128, paged), share of the ceiling",
}


class PublishError(ValueError):
    """Results that are not to be shown."""


def device_of(folder: Path) -> str:
    """Return the one GPU that a folder's benchmark was measured on.

    Raises:
        PublishError: files are missing, of a dry run, or of no or several GPUs.
    """
    if absent := [name for name in NEEDED if not (folder / name).exists()]:
        raise PublishError(f"{folder}: expected {', '.join(NEEDED)}, {', '.join(absent)} missing")
    if json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("dry") is not False:
        raise PublishError(f"{folder}: expected a run on a GPU, got a dry one")
    rows = rows_of(folder / "bench.csv") + rows_of(folder / "decode.csv")
    found = sorted({row["device"] for row in rows if row["sm"].isdigit()})
    if len(found) != 1 or any(not row["sm"].isdigit() for row in rows):
        raise PublishError(f"{folder}: expected rows of one GPU, got {', '.join({row['device'] for row in rows})}")
    return found[0]


def copy(folder: Path, results: Path = RESULTS) -> Path:
    """Copy a run's results into the folder of its GPU, in place of what was there, and return that folder."""
    target = results / slug(device_of(folder))
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for path in sorted({found for pattern in KEPT for found in folder.glob(pattern)}):
        shutil.copyfile(path, part / path.name)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return target


def share_of(bench: Rows, prefix: str) -> str:
    """Return the kernel's share of the ceiling at a shape's largest measured batch."""
    mine = {
        int(row["B"]): float(row["ceiling_share"])
        for row in timed(bench)
        if row["backend"] == "cuda" and re.fullmatch(rf"{prefix}\d+", row["workload"]) and row["ceiling_share"]
    }
    return f"{mine[max(mine)]:.0%} (B = {max(mine)})" if mine else NOT_MEASURED


def speed_up_of(bench: Rows) -> str:
    """Return the speed-up over the faster baseline over the plan's matrix."""
    rows = timed(bench)
    found = over(times(rows, *BASELINES), times(rows, "cuda"), "plan-")
    return f"{statistics.geometric_mean(found):.1f}x (at least {min(found):.1f}x)" if found else NOT_MEASURED


def table(results: Path = RESULTS) -> str:
    """Return the README's table of all results that are there."""
    folders = sorted(path.parent for path in results.glob("*/bench.csv"))
    benches = {device_of(folder): rows_of(folder / "bench.csv") for folder in folders}
    columns: dict[str, Rows] = {name: [] for name in COLUMNS}
    for device, rows in benches.items():
        columns[next((name for name in COLUMNS if re.search(rf"\b{name}\b", device)), device)] = rows
    lines = [" | ".join(["| what", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for prefix, what in SHAPES.items():
        lines.append(" | ".join([f"| {what}", *(share_of(rows, prefix) for rows in columns.values())]) + " |")
    lines.append(" | ".join(["| speed-up over the faster baseline", *map(speed_up_of, columns.values())]) + " |")
    return "\n".join(lines)


def filled(text: str, inside: str) -> str:
    """Return a document with what stands between the markers replaced.

    Raises:
        PublishError: not one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise PublishError(f"expected one pair of {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{inside}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Copy, fill, or check; returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.publish", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="results of a round to copy")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the table is out of date")
    given = parser.parse_args(arguments)
    try:
        if given.folder and not given.check:
            print(f"results: {copy(given.folder)}")
        before = README.read_text(encoding="utf-8")
        after = filled(before, table())
    except PublishError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if given.check:
        if before != after:
            print("README.md: the table of results is not what benchmarks/results says", file=sys.stderr)
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
