"""The guide and the records say what the code does: every column, every command, every rule's default."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from nsa_sel.cli.app import app
from nsa_sel.measure import schema
from nsa_sel.measure.judge.rules import load_rules

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "measuring.md").read_text(encoding="utf-8")
RECORDS = sorted((DOCS / "decisions").glob("*.md"))


def _section(title: str) -> str:
    return GUIDE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize(("name", "columns"), [("bench", schema.BENCH_COLUMNS), ("decode", schema.DECODE_COLUMNS)])
def test_every_column_is_explained_in_its_order(name: str, columns: tuple[str, ...]) -> None:
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", _section(f"Columns of {name}.csv"), re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", " ".join(cells))) == columns


def test_stages_and_default_rules_are_those_of_the_code() -> None:
    for stage in schema.STAGES:
        assert re.search(rf"^\| {stage} \|", GUIDE, re.MULTILINE)
    rules = load_rules()
    gates = _section("How to read the gates")
    assert f"at least {rules.share_min:g}" in gates
    assert f"at {rules.roi_margin:g}x" in gates
    assert "at most 1e-3" in gates
    assert rules.stability_max_mae == 1e-3
    assert f"more than {rules.trust_share_sum:g} of their step" in gates
    assert f"residual above {rules.trust_residual:.0%}".replace("%", " %") in gates
    assert f"more than {rules.trust_clock_drift:.0%} or".replace("%", " %") in gates
    assert f"{rules.trust_ceiling:g}x the measured ceiling" in gates
    assert f"fewer than {rules.trust_min_iters} samples" in gates


@pytest.mark.parametrize("path", [DOCS / "measuring.md", *RECORDS], ids=lambda path: path.name)
def test_commands_in_the_docs_exist_with_their_options(path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    seen = 0
    for line in "\n".join(blocks).splitlines():
        words = shlex.split(line, comments=True)
        if "nsa-sel" not in words:
            continue
        name, *rest = words[words.index("nsa-sel") + 1 :]
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, line
        seen += 1
    assert seen or path.name == "README.md"


def test_records_have_their_parts_and_say_that_flash_attention_is_a_peer() -> None:
    assert len(RECORDS) >= 5
    index = (DOCS / "decisions" / "README.md").read_text(encoding="utf-8")
    for path in RECORDS:
        text = path.read_text(encoding="utf-8")
        assert re.search(r"FlashAttention is .*peer|FlashAttention and the other peers", text), path.name
        if path.name == "README.md":
            continue
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
            "Context",
            "Findings",
            "Decision",
            "Consequences",
            "How to re-measure",
        ]
        assert f"({path.name})" in index
