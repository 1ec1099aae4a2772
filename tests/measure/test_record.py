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


def judged(folder: Path, verdict: str = "PASS", **of: float) -> Judgement:
    honest(folder, **({"speedup": 1.05} if verdict == "FAIL" else of))
    if verdict == "NOT MEASURED":
        (folder / "decode.json").unlink()
    found = judge(folder / "bench.csv", folder / "decode.csv", load_rules())
    assert found.verdict == verdict or of
    return found


def test_a_policy_is_written_beside_other_rules_and_missing_data_turns_nothing_on_or_off(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "policy.json"
    assert write_policy(judged(tmp_path, "NOT MEASURED"), path) is None
    assert not path.exists()
    other = {"NVIDIA A100": {"cuda": policy.Rule(True, 64)}, DEVICE: {"triton": policy.Rule(False, 7)}}
    policy.save(policy.Policy(other), path)
    for verdict, enabled in (("PASS", True), ("NOT MEASURED", True), ("FAIL", False)):
        write_policy(judged(tmp_path, verdict), path)
        after = policy.load(path)
        assert after.rule("NVIDIA A100", "cuda") == policy.Rule(True, 64)
        assert after.rule(DEVICE, "triton") == policy.Rule(False, 7)
        rule = after.rule(DEVICE, "cuda")
        assert rule is not None
        assert rule.enabled is enabled
        assert rule.min_l == 64 or not enabled
    path.write_text("{}")
    with pytest.raises(PolicyError):  # what is no policy is not overwritten
        write_policy(judged(tmp_path), path)
    assert path.read_text() == "{}"


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "NOT MEASURED"])
def test_record_has_its_parts_and_what_decided(tmp_path: Path, verdict: str) -> None:
    judgement = judged(tmp_path, verdict)
    path = write_record(judgement, tmp_path / "records")
    text = path.read_text()
    assert path.name == "decision-nvidia-h100-80gb-hbm3-cuda.md"
    parts = ["Context", "Findings", "Decision", "Consequences", "How to re-measure"]
    headings = [f"# {DEVICE} (SM 90), backend `cuda`: {verdict}", *(f"## {part}" for part in parts)]
    assert [line for line in text.splitlines() if line.startswith("#")] == headings
    assert "- driver: 580.12" in text
    assert "FlashAttention and the other peers are measured beside the kernel and are never routed to" in text
    assert all(plain(gate.reason) in text for gate in judgement.gates.values())


def test_record_shows_the_rows_that_decided(tmp_path: Path) -> None:
    text = decision_record(judged(tmp_path, share=0.2))
    for part in ("Rows that decided `share`:", "| 0.2 |", "Rows that decided `roi` (12 of 22):", "**FAIL.**"):
        assert part in text


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.md"]
