"""The fallback on a CPU beside what one would write instead: `python -m benchmarks.fallback [--json FILE]`.

All contestants run in one process on the same inputs, one call each per round, in turns that change from round to
round. What else the machine does can only lengthen a call, so ratios are those of the shortest calls; the milliseconds
are this machine's. The selected blocks change from round to round too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch.nn.functional import scaled_dot_product_attention

import nsa_sel
from nsa_sel.backends import _cpu
from nsa_sel.measure.run.clock import quantiles

S_KV = 8192  # tokens in each cache
BATCHES = (1, 4, 8, 32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WITH_GRADIENTS = 4  # the largest batch whose gradients are timed: they are as large as the caches
VARIANTS = 4  # selections, one after another


@dataclass(frozen=True)
class Shape:
    """A model's attention at one decode step."""

    name: str
    G: int
    h: int
    Dk: int
    Dv: int
    n: int  # selected blocks
    block_size: int


SHAPES = (
    Shape("NSA", G=4, h=16, Dk=192, Dv=128, n=16, block_size=64),
    Shape("M3", G=4, h=16, Dk=128, Dv=128, n=16, block_size=128),
    Shape("QSA", G=2, h=12, Dk=256, Dv=256, n=512, block_size=4),
    Shape("64/64", G=8, h=4, Dk=64, Dv=64, n=16, block_size=64),
)


@dataclass
class Result:
    """One case: shortest call, median and 80th percentile of every contestant, in ms."""

    shape: str
    dtype: str
    B: int
    selected_bytes: int
    rounds: int
    ms: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def ratio(self, slow: str, fast: str) -> float:
        """Return shortest over shortest; NaN where one was not measured."""
        return self.ms[slow][0] / self.ms[fast][0] if slow in self.ms and fast in self.ms else math.nan


@dataclass
class Inputs:
    """One call, in the shapes of `selection_attention`, with several selections."""

    shape: Shape
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    block_indices: list[torch.Tensor]

    def tokens(self, variant: int) -> torch.Tensor:
        """Return the selected token ids [B, 1, G, L]."""
        blocks = self.block_indices[variant].unsqueeze(-1) * self.shape.block_size
        return (blocks + torch.arange(self.shape.block_size)).flatten(-2)


def ours(x: Inputs, variant: int) -> torch.Tensor:
    """Attend by the public function, forced to the fallback."""
    out = nsa_sel.selection_attention(
        x.q, x.k, x.v, block_indices=x.block_indices[variant], block_size=x.shape.block_size, backend="sdpa"
    )
    assert isinstance(out, torch.Tensor)
    return out


def ours_without_attention(x: Inputs, variant: int) -> torch.Tensor:
    """Do all that `ours` does but the arithmetic on what was gathered."""
    with mock.patch.object(_cpu, "_attention", lambda q, k, v, **rest: (q, q[..., 0].float())):
        return ours(x, variant)


def naive(x: Inputs, variant: int) -> torch.Tensor:
    """Attend by torch.gather and matmul."""
    index = x.tokens(variant).unsqueeze(-1)
    k = x.k.unsqueeze(1).gather(3, index.expand(*index.shape[:-1], x.shape.Dk))
    v = x.v.unsqueeze(1).gather(3, index.expand(*index.shape[:-1], x.shape.Dv))
    return torch.softmax(x.q @ k.mT * x.shape.Dk**-0.5, -1) @ v


def gather_sdpa(x: Inputs, variant: int) -> torch.Tensor:
    """Gather by indexing, which copies whole rows, and attend to all of it at once by PyTorch's fused attention."""
    B, S, G = x.q.shape[:3]
    place = torch.arange(B).view(B, 1, 1, 1), torch.arange(G).view(1, 1, G, 1), x.tokens(variant)
    k, v = x.k[place].flatten(0, 1), x.v[place].flatten(0, 1)
    return scaled_dot_product_attention(x.q.flatten(0, 1), k, v).unflatten(0, (B, S))


def with_gradients(attend: Callable[[Inputs, int], torch.Tensor]) -> Callable[[Inputs, int], torch.Tensor]:
    """Return the forward and backward pass of a contestant."""

    def both(x: Inputs, variant: int) -> torch.Tensor:
        leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
        out = attend(Inputs(x.shape, *leaves, x.block_indices), variant)
        torch.autograd.grad(out.float().square().sum(), leaves)
        return out

    return both


ATTEND = {"ours": ours, "naive": naive, "gather_sdpa": gather_sdpa}
GRADIENTS = {f"{name}_grad": with_gradients(ATTEND[name]) for name in ("ours", "naive")}


def measure(x: Inputs, dtype: str, seconds: float, rounds: int) -> Result:
    """Time every contestant on one case, after all were found to agree."""
    shape, B = x.shape, x.q.shape[0]
    selected = B * shape.G * shape.n * shape.block_size * (shape.Dk + shape.Dv) * x.k.element_size()
    floor = torch.ones(selected // 4)
    contestants: dict[str, Callable[[Inputs, int], torch.Tensor]] = {
        "read": lambda x, variant: floor.sum(), "gather": ours_without_attention, **ATTEND
    } | (GRADIENTS if B <= WITH_GRADIENTS else {})  # fmt: skip
    before = nsa_sel.stats().get("sdpa", {}).get("backend='sdpa'", 0)
    expected = ours(x, 0).float()
    for name in contestants:
        out = contestants[name](x, 0)
        if name not in ("read", "gather"):
            torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    deadline = time.monotonic() + seconds
    done = 0
    while done < 3 or (done < rounds and time.monotonic() < deadline):
        names = list(contestants)
        for name in names[done % len(names) :] + names[: done % len(names)]:
            start = time.perf_counter()
            contestants[name](x, done % VARIANTS)
            samples[name].append((time.perf_counter() - start) * 1e3)
        done += 1
    ran = nsa_sel.stats()["sdpa"]["backend='sdpa'"] - before
    own = sum(name in contestants for name in ("ours", "gather", "ours_grad"))
    assert ran == 1 + own * (1 + done), f"the fallback ran {ran} times in {done} rounds"
    ms = {name: (min(times), *quantiles(times)[::2]) for name, times in samples.items()}
    return Result(shape.name, dtype, B, selected, done, ms)


def cases(shapes: tuple[Shape, ...], batches: tuple[int, ...]) -> Iterator[tuple[str, Inputs]]:
    """Yield every case with its inputs; the caches of a shape are made once and cut to each batch."""
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        B, G = max(batches), shape.G
        q = torch.randn(B, 1, G, shape.h, shape.Dk, generator=generator)
        k, v = (torch.empty(B, G, S_KV, D).uniform_(-1.7, 1.7, generator=generator) for D in (shape.Dk, shape.Dv))
        weights = torch.ones(B * G, S_KV // shape.block_size)
        ids = [torch.multinomial(weights, shape.n, generator=generator).view(B, 1, G, shape.n) for _ in range(VARIANTS)]
        for name, dtype in DTYPES.items():
            cast = [t.to(dtype) for t in (q, k, v)]
            for batch in batches:
                yield name, Inputs(shape, *(t[:batch] for t in cast), [i[:batch] for i in ids])


def table(results: list[Result]) -> str:
    """Return the results as a Markdown table and its summary."""
    lines = [
        "| shape | dtype | B | read, ms | gather / read | ours, ms (median, p80) | ours / read | naive / ours "
        "| gather + SDPA / ours | gradients: ours, ms | naive / ours |",
        "|" + "---|" * 11,
    ]
    for r in results:
        least, median, high = r.ms["ours"]
        grad = f"{r.ms['ours_grad'][0]:.2f} | {r.ratio('naive_grad', 'ours_grad'):.2f}x" if "ours_grad" in r.ms else "|"
        lines.append(
            f"| {r.shape} | {r.dtype} | {r.B} | {r.ms['read'][0]:.3f} | {r.ratio('gather', 'read'):.1f}x "
            f"| {least:.2f} ({median:.2f}, {high:.2f}) | {r.ratio('ours', 'read'):.1f}x "
            f"| {r.ratio('naive', 'ours'):.2f}x | {r.ratio('gather_sdpa', 'ours'):.2f}x | {grad} |"
        )
    return "\n".join([*lines, "", *summary(results)])


def summary(results: list[Result]) -> list[str]:
    """Return the geometric mean and the least of each ratio, against what is aimed at."""

    def line(what: str, slow: str, fast: str, aim: str) -> str:
        ratios = [ratio for r in results if not math.isnan(ratio := r.ratio(slow, fast))]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        return f"{what}: geometric mean {mean:.2f}x, {min(ratios):.2f}x to {max(ratios):.2f}x{aim}"

    return [
        line("naive / ours", "naive", "ours", " (aim: a mean of 4x or more, nowhere under 1.2x)"),
        line("gather + SDPA / ours", "gather_sdpa", "ours", ""),
        line("gather / read", "gather", "read", " (aim: 2x or less)"),
        line("gradients, naive / ours", "naive_grad", "ours_grad", ""),
    ]


def picture(results: list[Result], path: Path) -> None:
    """Draw how many times the read floor each contestant takes, one panel for each shape and dtype."""
    from matplotlib.figure import Figure

    shapes, dtypes = list(dict.fromkeys(r.shape for r in results)), list(dict.fromkeys(r.dtype for r in results))
    figure = Figure(figsize=(3.2 * len(shapes), 2.6 * len(dtypes)), layout="constrained")
    axes = figure.subplots(len(dtypes), len(shapes), sharex=True, sharey=True, squeeze=False)
    styles = {"naive": ("#cc4125", "s"), "gather_sdpa": ("#e69138", "^"), "ours": ("#0b5394", "o")}
    for axis_row, dtype in zip(axes, dtypes, strict=True):
        for axis, shape in zip(axis_row, shapes, strict=True):
            mine = [r for r in results if (r.shape, r.dtype) == (shape, dtype)]
            for name, (colour, marker) in styles.items():
                times = [r.ratio(name, "read") for r in mine]
                axis.plot([r.B for r in mine], times, color=colour, marker=marker, markersize=4, label=name)
            axis.set(title=f"{shape}, {dtype}", xscale="log", yscale="log")
            axis.set_xticks(sorted({r.B for r in results}), labels=[str(b) for b in sorted({r.B for r in results})])
            axis.minorticks_off()
            axis.grid(True, alpha=0.3)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.supxlabel("B")
    figure.supylabel("time over that of reading the selected bytes once")
    figure.savefig(path, dpi=110)


def machine() -> dict[str, object]:
    """Return what the figures depend on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].split(":")[1].strip() if models else "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "second_level_cache_bytes": _cpu.cache_bytes(),
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }


def main() -> None:
    """Measure, print the table, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the ratios to the read floor")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25, help="at most, for each case")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case, if three rounds fit")
    parser.add_argument("--shape", choices=[s.name for s in SHAPES], action="append", help="default: all")
    parser.add_argument("--batch", type=int, choices=BATCHES, action="append", help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine()
    shapes = tuple(s for s in SHAPES if options.shape is None or s.name in options.shape)
    results = []
    for dtype, inputs in cases(shapes, tuple(options.batch or BATCHES)):
        results.append(measure(inputs, dtype, options.seconds, options.rounds))
    about["load_after"] = os.getloadavg()[0]
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    if max(about["load_before"], about["load_after"] - options.threads) > 0.5:  # type: ignore[operator, type-var]
        print("**The machine was busy with something else: only the ratios say anything, and they are noisy.**")
    print("\n" + table(results))
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "results": [asdict(r) for r in results]}, indent=1))
    if options.picture:
        picture(results, options.picture)


if __name__ == "__main__":
    main()
