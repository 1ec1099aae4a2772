"""The one place that names the columns of the CSV files, in their order."""

from __future__ import annotations

# One row of bench.csv: a backend on a workload in a mode. Times in milliseconds per call, bytes per call, GB/s decimal.
BENCH_COLUMNS = (
    "workload",
    "dist",
    "dtype",
    "B",
    "S",
    "G",
    "h",
    "Dk",
    "Dv",
    "S_kv",
    "n",
    "L",
    "rows",
    "backend",
    "ran",
    "mode",
    "iters",
    "ms_median",
    "ms_p20",
    "ms_p80",
    "bytes",
    "gbps",
    "ceiling_gbps",
    "ceiling_share",
    "speedup",
    "mae",
    "max_err",
    "device",
    "sm",
    "commit",
)
BENCH_SHAPE = ("B", "S", "G", "h", "Dk", "Dv", "S_kv", "n", "L", "rows")
BENCH_COUNTS = (*BENCH_SHAPE, "iters", "bytes")
BENCH_FIGURES = ("ms_median", "ms_p20", "ms_p80", "gbps", "ceiling_gbps", "ceiling_share", "speedup", "mae", "max_err")
BENCH_TIMES = ("ms_median", "ms_p20", "ms_p80")

# What makes two rows the same measurement by two backends. The workload's name alone is not enough: names are free.
BENCH_CASE = ("workload", "dist", "dtype", *BENCH_SHAPE)

# One row of decode.csv: a stage of one decode step.
DECODE_COLUMNS = (
    "B",
    "context",
    "stage",
    "ms_median",
    "ms_p20",
    "ms_p80",
    "share",
    "backend",
    "ran",
    "device",
    "sm",
    "commit",
)
DECODE_COUNTS = ("B", "context")
DECODE_TIMES = ("ms_median", "ms_p20", "ms_p80")
DECODE_FIGURES = (*DECODE_TIMES, "share")
STAGES = ("compress", "score", "select", "window", "gate")
TORCH = "torch"  # the backend of the stages that are plain PyTorch

DISTRIBUTIONS = ("few", "many", "mixed")
MODES = ("eager", "graph", "streams2")
BASELINE = "sdpa"
PREPARED = "sdpa_prepared"
BASELINES = (BASELINE, PREPARED)  # the faster of these is what a kernel has to beat
HERE = ("cuda", "triton", *BASELINES, "sdpa_gathered")  # what needs no peer's library and runs in one process
SPANS_FROM = 8  # tokens from which on every distribution of spans has rows
STEP = "step"  # in the column stage: the whole step

DTYPE_BYTES = {
    "bf16": 2,
    "bfloat16": 2,
    "torch.bfloat16": 2,
    "fp16": 2,
    "f16": 2,
    "float16": 2,
    "torch.float16": 2,
    "fp32": 4,
    "float32": 4,
    "torch.float32": 4,
    "fp64": 8,
    "float64": 8,
    "torch.float64": 8,
}

PASS = "PASS"
FAIL = "FAIL"
NOT_MEASURED = "NOT MEASURED"
EXIT_CODES = {PASS: 0, FAIL: 1, NOT_MEASURED: 2}


def call_bytes(
    rows: int, h: int, dims: tuple[int, int], n: int, length: int, element: int, index: int = 4, per_slot: int = 2
) -> int:
    """Return the bytes of one call: K and V selected, q, out, lse (fp32), the selection (`per_slot` indices a slot).

    >>> call_bytes(rows=64, h=4, dims=(64, 64), n=1, length=128, element=2)
    2164224
    """
    keys_values = rows * length * sum(dims) * element
    queries_out = rows * h * sum(dims) * element
    return keys_values + queries_out + rows * h * 4 + rows * n * per_slot * index
