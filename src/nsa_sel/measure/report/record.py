"""What a judgement leaves behind: the decision record of a GPU and the policy that routing reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nsa_sel import policy
from nsa_sel.measure import schema
from nsa_sel.measure.files import write_atomically
from nsa_sel.measure.judge.gate import Gate, Judgement
from nsa_sel.measure.judge.trust_decode import Step
from nsa_sel.measure.report.markdown import plain, table_lines

_SHOWN_ROWS = 12
_SHOWN_COLUMNS = (
    "line", "dist", "h", "Dk", "Dv", "B", "L", "rows", "context", "stage", "mode", "ms_median", "roi", "roi_low",
    "share", "mae",
)  # fmt: skip
_DECISIONS = {
    schema.PASS: "The kernel is on by default on this GPU where the L bound is at least {min_l}; "
    "below it calls go to packed SDPA.",
    schema.FAIL: "The kernel stays off by default on this GPU; every call goes to packed SDPA. "
    "`NSA_SEL_CUDA=1` turns it on by hand.",
    schema.NOT_MEASURED: "No decision: the data supports none. Routing stays as it was and no policy is written.",
}
_CONSEQUENCES = {
    schema.PASS: "- Routing reads `min_l = {min_l}` for this device. "
    "A call that gives no L bound runs the kernel at any L.\n"
    "- The decision holds for this device's name, these versions and the measured L; no larger L was measured.",
    schema.FAIL: "- Nothing gets slower than packed SDPA. What the kernel would have gained where it is faster is "
    "given up.\n- Worth another look after a change of the kernel, the driver or PyTorch.",
    schema.NOT_MEASURED: "- No speed claim may be made for this GPU.\n"
    "- The reasons above name what is missing; measure that and judge again.",
}
_PEERS = "- FlashAttention and the other peers are measured beside the kernel and are never routed to."


def slug(name: str) -> str:
    """Return a device's name as part of a file's name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "no-device"


def decision_record(judgement: Judgement) -> str:
    """Return the decision record in Markdown: context, findings, decision, consequences, how to re-measure."""
    device = plain(judgement.device) or "no device"
    lines = [
        f"# {device} (SM {plain(judgement.sm) or 'unknown'}), backend `{judgement.backend}`: {judgement.verdict}",
        "",
        "## Context",
        "",
        f"A GPU gets the `{judgement.backend}` kernel by default only where the selection takes at least "
        f"{judgement.rules.share_min:.0%} of a decode step on packed SDPA, "
        f"the kernel is at least {judgement.rules.roi_margin:g}x the faster baseline, and "
        f"its MAE against the fp64 oracle is at most {judgement.rules.stability_max_mae:g}. Judged from "
        f"`{judgement.sources['bench']}` and `{judgement.sources['decode']}` alone.",
        "",
        *environment_lines(judgement.environment),
        "## Findings",
        "",
        *_findings(judgement),
        "## Decision",
        "",
        f"**{judgement.verdict}.** " + _DECISIONS[judgement.verdict].format(min_l=judgement.min_l),
        "",
        "## Consequences",
        "",
        _CONSEQUENCES[judgement.verdict].format(min_l=judgement.min_l),
        _PEERS,
        "",
        "## How to re-measure",
        "",
        "On this GPU, from the root of a checkout:",
        "",
        "```sh",
        "nsa-sel bench --out results",
        "nsa-sel decode --out results",
        "nsa-sel gate --bench results/bench.csv --decode results/decode.csv "
        f"--backend {judgement.backend} --out results --write-policy default",
        "```",
        "",
    ]
    return "\n".join(lines)


def write_record(judgement: Judgement, folder: Path) -> Path:
    """Write the decision record into `folder` and return its path."""
    path = folder / f"decision-{slug(judgement.device)}-{judgement.backend}.md"
    write_atomically(path, decision_record(judgement))
    return path


def write_policy(judgement: Judgement, path: Path) -> policy.Policy | None:
    """Put the judgement into the policy file at `path`, beside what it says of other devices and backends.

    Returns the policy written, or None for NOT MEASURED: missing data turns nothing on and nothing off.

    Raises:
        nsa_sel.errors.PolicyError: a policy file stands there and does not hold a policy.
    """
    if judgement.verdict == schema.NOT_MEASURED:
        return None
    before = policy.load(path) if path.exists() else policy.Policy()
    devices = {device: dict(rules) for device, rules in before.devices.items()}
    enabled = judgement.verdict == schema.PASS
    rule = policy.Rule(enabled=enabled, min_l=judgement.min_l or 0)
    devices.setdefault(judgement.device, {})[judgement.backend] = rule
    after = policy.Policy(devices)
    policy.save(after, path)
    return after


def gate_table(judgement: Judgement) -> list[str]:
    """Return the Markdown table of the gates."""
    gates = judgement.gates.items()
    rows = [(n, g.verdict, "" if g.value is None else f"{g.value:.4g}", plain(g.reason)) for n, g in gates]
    return table_lines(("gate", "verdict", "value", "why"), rows)


def step_table(steps: list[Step]) -> list[str]:
    """Return the Markdown table of the steps: share, the selection's speed-up, the whole step's beside Amdahl's."""
    rows = [
        (f"{s.B:g}", f"{s.context:g}", f"{s.share:.1%}", *(f"{x:.2f}x" for x in (s.selection, s.speedup, s.expected)))
        for s in steps
    ]
    return table_lines(("B", "context", "share s", "selection x", "whole step", "1 / (1 - s + s / x)"), rows)


def environment_lines(environment: dict[str, Any]) -> list[str]:
    """Return the plain values of an environment as a list."""
    shown = {key: one for key, one in environment.items() if isinstance(one, (str, int, float, bool)) and one != ""}
    return [*(f"- {plain(key)}: {plain(value)}" for key, value in shown.items()), ""] if shown else []


def _findings(judgement: Judgement) -> list[str]:
    lines = [*gate_table(judgement), ""]
    for name, gate in judgement.gates.items():
        if gate.rows:
            lines += _deciding_rows(name, gate)
    if judgement.steps:
        lines += ["The whole step, with packed SDPA and with the kernel:", "", *step_table(judgement.steps), ""]
    if judgement.remarks:
        lines += ["Odd, but deciding nothing:", "", *(f"- {plain(remark)}" for remark in judgement.remarks), ""]
    return lines


def _deciding_rows(name: str, gate: Gate) -> list[str]:
    columns = [column for column in _SHOWN_COLUMNS if column in gate.rows[0]]
    shown = sorted(gate.rows, key=lambda row: row["roi_low" if name == "roi" else "line"])[:_SHOWN_ROWS]
    text = [[f"{row[c]:.4g}" if isinstance(row[c], float) else plain(row[c]) for c in columns] for row in shown]
    of = f" ({len(shown)} of {len(gate.rows)})" if len(gate.rows) > len(shown) else ""
    return [f"Rows that decided `{name}`{of}:", "", *table_lines(columns, text), ""]
