"""The one place that names the columns of the CSV files, in their order."""

from __future__ import annotations

BENCH_SHAPE = ("B", "S", "G", "h", "Dk", "Dv", "S_kv", "n", "L", "rows")
TIMES = ("ms_median", "ms_p20", "ms_p80")
WHERE = ("device", "sm", "commit")

# One row of bench.csv: a backend on a workload in a mode. Times in milliseconds per call, bytes per call, GB/s decimal.
BENCH_COLUMNS = (
    "workload", "dist", "dtype", *BENCH_SHAPE, "backend", "ran", "mode", "iters", *TIMES, "bytes", "gbps",
    "ceiling_gbps", "ceiling_share", "speedup", "mae", "max_err", *WHERE,
)  # fmt: skip
BENCH_COUNTS = (*BENCH_SHAPE, "iters", "bytes")
BENCH_FIGURES = (*TIMES, "gbps", "ceiling_gbps", "ceiling_share", "speedup", "mae", "max_err")

# One row of decode.csv: a stage of one decode step.
DECODE_COLUMNS = ("B", "context", "stage", *TIMES, "share", "backend", "ran", *WHERE)
DECODE_COUNTS = ("B", "context")
DECODE_FIGURES = (*TIMES, "share")
STAGES = ("compress", "score", "select", "window", "gate")
STEP = "step"  # in the column stage: the whole step
TORCH = "torch"  # the backend of the stages that are plain PyTorch

DISTRIBUTIONS = ("few", "many", "mixed")  # of spans; the fourth, blocks, has block ids
SPANS_FROM = 8  # tokens from which on every distribution of spans has rows
MODES = ("eager", "graph", "streams2")
BASELINE = "sdpa"
BASELINES = (BASELINE, "sdpa_prepared")  # the faster of these is what a kernel has to beat
OWN = ("cuda", "triton", BASELINE)  # the package's own backends
HERE = (*OWN, "sdpa_prepared", "sdpa_gathered")  # what needs no peer's library and runs in one process, in turns

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}

PASS, FAIL, NOT_MEASURED = "PASS", "FAIL", "NOT MEASURED"
EXIT_CODES = {PASS: 0, FAIL: 1, NOT_MEASURED: 2}


def call_bytes(rows: int, h: int, dims: tuple[int, int], n: int, length: int, element: int, per_slot: int = 2) -> int:
    """Return the bytes of one call: K and V selected, q, out, lse (fp32), the selection (`per_slot` int32 a slot).

    >>> call_bytes(rows=64, h=4, dims=(64, 64), n=1, length=128, element=2)
    2164224
    """
    return rows * ((length + h) * sum(dims) * element + 4 * h + 4 * n * per_slot)
