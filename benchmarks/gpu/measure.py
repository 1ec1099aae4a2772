"""The benchmarks and the judgements of the round, all by the `nsa-sel` commands.

In the dry form the commands run on the CPU, the host run takes the kernel's place in the rows of `cuda`, and every time
is left empty.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import MORE, ROOT, TELLS, arguments, finish, has_gpu

HERE = Path(__file__).resolve().parent
CHUNK_SECONDS = 420  # after which bench starts no further workload; the rest of ten minutes is for the last one
BATCHES = (1, 8, 64)
HOST_RUN = "host run"  # in the column `ran`: the kernel's source, but no GPU
BENCH_TIMES = ("ms_median", "ms_p20", "ms_p80", "gbps", "ceiling_gbps", "ceiling_share", "speedup")
DECODE_TIMES = ("ms_median", "ms_p20", "ms_p80", "share")
Rows = list[dict[str, Any]]


def nsa_sel(*options: object) -> int:
    """Run the command of this environment and return its exit status."""
    command = [str(Path(sys.executable).with_name("nsa-sel")), *map(str, options)]
    print("$", " ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def read_rows(path: Path) -> Rows:
    """Return the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows with the columns of the first one."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def bench(options: argparse.Namespace) -> None:
    """The matrix with every peer that is there, a chunk at a time; 3 while there is more to do."""
    out = options.out
    if options.dry or not has_gpu():
        limit = 3 if options.small else 7
        dry_bench(out, "ci", limit)
        finish(False, True, f"{limit} workloads on the CPU, times left empty")
    key = out / "steps" / "bench-began.json"  # a chunk goes on only from what the same sources on the same GPU began
    identity = key.read_text(encoding="utf-8") if key.exists() else ""
    resume = ["--resume"] if identity == options.identity and (out / "bench.csv").exists() else []
    key.parent.mkdir(parents=True, exist_ok=True)
    key.write_text(options.identity, encoding="utf-8")
    suites = "ci" if options.small else "plan,decode,models"
    code = nsa_sel(
        "bench", "--suite", suites, "--peers", ROOT / "benchmarks" / "peers", "--out", out, "--seconds",
        min(CHUNK_SECONDS, max(30, options.seconds - 120)), *resume,
    )  # fmt: skip
    data = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    late = [name for name, why in data["skipped"].items() if why.startswith("not started within")]
    done = len({row["workload"] for row in read_rows(out / "bench.csv")})
    if late and code in (0, 1):
        print(f"{TELLS}{done} workloads are done, {len(late)} left")
        sys.exit(MORE)
    failures = len(data["parity_failures"])
    finish(code != 0, False, f"{done} workloads, {failures} parity failures, {len(data['skipped'])} do not fit")


def again(options: argparse.Namespace) -> None:
    """A few shapes in a run of their own, to hold against bench.csv: again.csv."""
    part = options.out / "part"
    if options.dry or not has_gpu():
        options.out.mkdir(parents=True, exist_ok=True)
        dry_bench(part, "ci", 1)
    else:
        code = nsa_sel(
            "bench", "--suite", HERE / "again.toml", "--backend", "cuda,sdpa", "--mode", "graph", "--out", part
        )
        if code != 0:
            finish(True, False, f"bench ended with {code}")
    (part / "bench.csv").replace(options.out / "again.csv")
    shutil.rmtree(part)
    finish(False, options.dry or not has_gpu(), f"{len(read_rows(options.out / 'again.csv'))} rows")


def decode(options: argparse.Namespace) -> None:
    """The decode step, one batch size after another: a GPU whose memory ends at one still has the others."""
    out, dry = options.out, options.dry or not has_gpu()
    small = ["--context", "1024", "--B", "1", "--iters", "1", "--warmup", "0", "--device", "cpu"]
    rows: Rows = []
    data: dict[str, Any] = {}
    failed = []
    for batch in (1,) if dry or options.small else BATCHES:
        part = out / "part"
        code = nsa_sel("decode", "--out", part, *(small if dry else ["--B", batch]))
        if code != 0:
            failed.append(f"B = {batch} ended with {code}")
            continue
        rows += read_rows(part / "decode.csv")
        one = json.loads((part / "decode.json").read_text(encoding="utf-8"))
        data = one if not data else data | {"steps": data["steps"] + one["steps"]}
        shutil.rmtree(part)
    if not rows:
        finish(True, dry, "; ".join(failed))
    if dry:
        rows = [row | dict.fromkeys(DECODE_TIMES, "") for row in rows]
        kept = ("B", "context", "bytes_read", "sparse")
        data["steps"] = [{name: step[name] for name in kept} for step in data["steps"]]
        data["notes"] = [*data["notes"], "NOT MEASURED: no GPU, times left out"]
    if failed:
        data["notes"] = [*data["notes"], *failed]
    write_rows(out / "decode.csv", rows)
    (out / "decode.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    finish(False, dry, f"{len(data['steps'])} steps" + (f"; {'; '.join(failed)}" if failed else ""))


def dry_bench(out: Path, suite: str, limit: int) -> None:
    """Run `nsa-sel bench` on the CPU, empty its times, and put the host run's errors into the rows of cuda.

    Raises:
        RuntimeError: the command failed, or the kernel's source is wrong on the emulator.
    """
    code = nsa_sel(
        "bench", "--suite", suite, "--limit", limit, "--backend", "cuda,sdpa,sdpa_gathered", "--mode", "eager",
        "--device", "cpu", "--iters", 1, "--warmup", 0, "--out", out,
    )  # fmt: skip
    if code != 0:
        raise RuntimeError(f"nsa-sel bench ended with {code}")
    errors = host_run_errors(suite, limit)
    rows = []
    for row in read_rows(out / "bench.csv"):
        row |= dict.fromkeys(BENCH_TIMES, "") | {"iters": 0}
        if row["backend"] == "cuda":
            mae, largest = errors[row["workload"]]
            row |= {"ran": HOST_RUN, "mae": f"{mae:.7g}", "max_err": f"{largest:.7g}"}
        rows.append(row)
    write_rows(out / "bench.csv", rows)
    data = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    data |= {"intervals": [], "dry": "NOT MEASURED: no GPU, times left out; cuda is the host run of its source"}
    (out / "bench.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def host_run_errors(suite: str, limit: int) -> dict[str, tuple[float, float]]:
    """Return mean and largest error of the kernel's source on the CPU, by workload.

    Raises:
        RuntimeError: the emulator found something wrong, or the error is too large.
    """
    import torch

    from nsa_sel.measure import inputs as made
    from nsa_sel.measure.contestants import check_of
    from nsa_sel.measure.timed import errors
    from nsa_sel.measure.workload import load_suite
    from nsa_sel.reference import selection_attention_reference
    from tests import host_run
    from tests.host_run import mutation

    found = {}
    for workload in load_suite(suite)[:limit]:
        one = made.variants_of(workload, 0, torch.device("cpu"), 0, 0)[0]
        rows = made.oracle_rows(workload, 0)
        expected, _ = selection_attention_reference(one.q, one.k, one.v, **one.selection(), rows=rows)
        ran = host_run.selection_attention(
            one.q, one.k, one.v, **one.selection(), max_selected=workload.L,
            options=host_run.Options(device=mutation.H200),
        )  # fmt: skip
        mae, largest = errors(ran.out, expected, rows)
        if ran.findings or not mae <= check_of(workload):
            raise RuntimeError(f"{workload.name} on the emulator: MAE {mae:.3g}, {'; '.join(ran.findings)}")
        found[workload.name] = (mae, largest)
    return found


def judge(options: argparse.Namespace) -> None:
    """threshold or gate: the verdict is the outcome's sentence; without a verdict it is NOT MEASURED."""
    out = options.out
    if options.what == "threshold":
        code = nsa_sel("threshold", out / "bench.csv", "--out", out)
    else:
        files = ["--bench", out / "bench.csv", "--decode", out / "decode.csv"]
        code = nsa_sel("gate", *files, "--out", out, "--write-policy", out / "policy.json")
    verdict = {0: "PASS", 1: "FAIL", 2: "NOT MEASURED"}.get(code)
    if verdict is None or (options.dry and code != 2):  # nothing may pass or fail on data without times
        finish(True, options.dry, f"{options.what} ended with {code}")
    finish(False, code == 2, f"the verdict is {verdict}")


def report(options: argparse.Namespace) -> None:
    """The page and its pictures."""
    code = nsa_sel("report", options.out)
    finish(code != 0, options.dry, "report.md" if code == 0 else f"report ended with {code}")


STEPS = {"bench": bench, "again": again, "decode": decode, "threshold": judge, "gate": judge, "report": report}


def main() -> None:
    """Run one of STEPS: `python -m benchmarks.gpu.measure --out DIR WHAT SECONDS IDENTITY`."""
    options = arguments(__doc__, "what", "seconds", "identity")
    options.seconds = float(options.seconds)
    STEPS[options.what](options)


if __name__ == "__main__":
    main()
