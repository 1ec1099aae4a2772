"""What a judgement leaves behind: a record of what decided, and a policy that missing data does not change."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_sel import policy
from nsa_sel.errors import PolicyError
from nsa_sel.measure.files import write_atomically
from nsa_sel.measure.judge.gate import Judgement, judge
from nsa_sel.measure.judge.rules import load_rules
from nsa_sel.measure.report.markdown import plain
from nsa_sel.measure.report.record import decision_record, write_policy, write_record
from tests.planted import honest

DEVICE = "NVIDIA H100 80GB HBM3"


def _judged(folder: Path, **honest_with: float) -> Judgement:
    honest(folder, **honest_with)
    return judge(folder / "bench.csv", folder / "decode.csv", load_rules())


def _pass(folder: Path) -> Judgement:
    return _judged(folder)


def _fail(folder: Path) -> Judgement:
    return _judged(folder, speedup=1.05)


def _not_measured(folder: Path) -> Judgement:
    honest(folder)
    (folder / "decode.json").unlink()
    return judge(folder / "bench.csv", folder / "decode.csv", load_rules())


def test_a_pass_turns_the_kernel_on_from_its_threshold(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "policy.json"
    assert write_policy(_pass(tmp_path), path) is not None
    assert policy.load(path).rule(DEVICE, "cuda") == policy.Rule(enabled=True, min_l=64)


def test_a_fail_turns_the_kernel_off(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    write_policy(_fail(tmp_path), path)
    rule = policy.load(path).rule(DEVICE, "cuda")
    assert rule is not None
    assert rule.enabled is False


def test_missing_data_turns_nothing_on_and_nothing_off(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    assert write_policy(_not_measured(tmp_path), path) is None
    assert not path.exists()
    write_policy(_pass(tmp_path), path)
    before = path.read_bytes()
    assert write_policy(_not_measured(tmp_path), path) is None
    assert path.read_bytes() == before


def test_other_devices_and_backends_keep_their_rules(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    other = policy.Policy({"NVIDIA A100": {"cuda": policy.Rule(True, 64)}, DEVICE: {"triton": policy.Rule(False, 7)}})
    policy.save(other, path)
    write_policy(_pass(tmp_path), path)
    after = policy.load(path)
    assert after.rule("NVIDIA A100", "cuda") == policy.Rule(True, 64)
    assert after.rule(DEVICE, "triton") == policy.Rule(False, 7)
    assert after.rule(DEVICE, "cuda") == policy.Rule(True, 64)


def test_a_file_that_is_no_policy_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text("{}")
    with pytest.raises(PolicyError):
        write_policy(_pass(tmp_path), path)
    assert path.read_text() == "{}"


@pytest.mark.parametrize("make", [_pass, _fail, _not_measured])
def test_record_has_its_parts_and_what_decided(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    judgement = make(tmp_path)
    path = write_record(judgement, tmp_path / "records")
    text = path.read_text()
    assert path.name == "decision-nvidia-h100-80gb-hbm3-cuda.md"
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        f"# {DEVICE} (SM 90), backend `cuda`: {judgement.verdict}",
        "## Context",
        "## Findings",
        "## Decision",
        "## Consequences",
        "## How to re-measure",
    ]
    assert "- driver: 580.12" in text
    assert "FlashAttention and the other peers are measured beside the kernel and are never routed to" in text
    for gate in judgement.gates.values():
        assert plain(gate.reason) in text


def test_record_shows_the_rows_that_decided(tmp_path: Path) -> None:
    text = decision_record(_judged(tmp_path, share=0.2))
    assert "Rows that decided `share`:" in text
    assert "| 0.2 |" in text
    assert "Rows that decided `roi` (12 of 22):" in text
    assert "**FAIL.**" in text


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.md"]
