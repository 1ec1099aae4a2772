"""Files that are missing or are no tables, and rules that are not what they should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_sel.measure import schema
from nsa_sel.measure.judge.gate import Judgement, judge
from nsa_sel.measure.judge.rules import RulesError, load_rules
from tests.planted import write


def _verdicts(judgement: Judgement) -> tuple[str, ...]:
    return tuple(judgement.gates[name].verdict for name in ("share", "roi", "stability"))


@pytest.mark.parametrize("missing", ["bench", "decode", "both"])
def test_missing_files(tmp_path: Path, missing: str) -> None:
    paths = write(tmp_path)
    for name, path in zip(("bench", "decode"), paths, strict=True):
        if missing in (name, "both"):
            path.unlink()
    judgement = judge(*paths, load_rules())
    expected = {"bench": ("PASS", "NOT MEASURED", "NOT MEASURED"), "decode": ("NOT MEASURED", "PASS", "PASS")}
    assert _verdicts(judgement) == expected.get(missing, (schema.NOT_MEASURED,) * 3)
    assert judgement.exit_code == 2
    assert judge(None, None, load_rules()).exit_code == 2


@pytest.mark.parametrize("text", ["", "\n\n", "not a table", "a,b\n1,2,3,4\n", "\x00\xff"])
def test_files_that_are_no_table(tmp_path: Path, text: str) -> None:
    bench_path, decode_path = write(tmp_path)
    bench_path.write_text(text, encoding="latin-1")
    judgement = judge(bench_path, decode_path, load_rules())
    assert _verdicts(judgement) == ("PASS", "NOT MEASURED", "NOT MEASURED")
    assert judge(tmp_path, decode_path, load_rules()).exit_code == 2  # a folder


def test_rows_with_more_cells_than_the_header_are_not_shifted_into_it(tmp_path: Path) -> None:
    bench_path, decode_path = write(tmp_path)
    lines = bench_path.read_text().splitlines()
    bench_path.write_text("\n".join([lines[0], *(f"{line},extra" for line in lines[1:])]))
    assert "do not have the same columns" in judge(bench_path, decode_path, load_rules()).gates["roi"].reason


def test_rules_are_data_and_unknown_ones_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text("[share]\nmin = 0.5\n[roi]\nmargin = 2.5\n")
    judgement = judge(*write(tmp_path), load_rules(path))
    assert _verdicts(judgement) == ("FAIL", "FAIL", "PASS")
    for text, message in (
        ("[roi]\nmargn = 1.0\n", "got roi.margn"),
        ("[roi]\nmargin = 'fast'\n", "got 'fast'"),
        ("[roi]\nmargin = 0\n", "got 0"),
        ("[roi]\nmargin = nan\n", "got nan"),
        ("[stability]\nmax_mae = inf\n", "got inf"),
        ("[share]\nmin = true\n", "got True"),
        ("[trust]\ndistributions = []\n", "a list of names"),
        ("share = 1\n", "expected tables"),
        ("[share\n", "expected TOML"),
    ):
        path.write_text(text)
        with pytest.raises(RulesError, match=message):
            load_rules(path)
    with pytest.raises(RulesError, match="expected a TOML file"):
        load_rules(tmp_path / "none.toml")
