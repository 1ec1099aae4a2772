"""The console script: `nsa-sel demo` and `nsa-sel info`, and what they answer to bad options."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import nsa_sel
import nsa_sel.cli
from nsa_sel import policy
from nsa_sel.cli import demo as demo_command
from nsa_sel.cli.app import app
from nsa_sel.demo import Row

SMALL = ("--device", "cpu", "--contexts", "512,1k", "--steps", "2")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def flat(text: str) -> str:
    """Return the words of boxed and wrapped output on one line."""
    return " ".join(text.replace("│", " ").split())


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_script_is_installed_and_lists_its_commands() -> None:
    if nsa_sel.__version__ == "0+source":
        pytest.skip("the package is not installed, only on the path")
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="nsa-sel")
    assert script.load() is nsa_sel.cli.main
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("demo", "info"):
        assert command in result.output


def test_demo_leaves_a_table_a_csv_and_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = invoke("demo", "--out", out, *SMALL)
    assert result.exit_code == 0, result.output
    rows = read(out / "demo.csv")
    assert list(rows[0]) == [field.name for field in fields(Row)]
    assert [(row["shape"], row["context"]) for row in rows] == [
        (shape, context) for shape in ("NSA paper", "MiniMax-M3") for context in ("512", "1024")
    ]
    for row in rows:
        assert (row["backend"], row["reason"], row["dtype"]) == ("sdpa", "tensors on cpu", "float32")
        assert float(row["max_err"]) < 1e-4
        assert float(row["speedup"]) == pytest.approx(float(row["dense_ms"]) / float(row["select_ms"]), rel=1e-4)
    # 512 tokens are 8 blocks of 64: all of them are selected, and all of the mass with them.
    assert float(rows[0]["captured"]) == pytest.approx(1, abs=1e-5)
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["demo.csv", "demo.png"]
    for expected in ("NSA paper: 64 heads in 4 groups", "16 blocks of 128, paged", "sdpa (tensors on cpu)", "fp64"):
        assert expected in result.output


def test_demo_takes_dtype_backend_and_seed(tmp_path: Path) -> None:
    arguments = ("demo", "--dtype", "bf16", "--backend", "sdpa", "--seed", "3", *SMALL)
    assert invoke(*arguments, "--out", tmp_path / "a").exit_code == 0
    assert invoke(*arguments, "--out", tmp_path / "b").exit_code == 0
    first, second = read(tmp_path / "a" / "demo.csv"), read(tmp_path / "b" / "demo.csv")
    assert {(row["dtype"], row["backend"], row["reason"]) for row in first} == {("bfloat16", "sdpa", "backend='sdpa'")}
    assert [row["max_err"] for row in first] == [row["max_err"] for row in second]
    assert all(1e-5 < float(row["max_err"]) < 3e-2 for row in first)  # bf16 really


def test_demo_says_why_a_forced_backend_cannot_run(tmp_path: Path) -> None:
    result = invoke("demo", "--backend", "cuda", "--out", tmp_path, *SMALL)
    assert result.exit_code == 2
    assert "backend='cuda'" in result.output
    assert "tensors on cpu" in flat(result.output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [1.0, math.nan])
def test_demo_fails_where_the_oracle_disagrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    genuine = nsa_sel.selection_attention

    def wrong(*tensors: torch.Tensor, **others: object) -> torch.Tensor:
        return genuine(*tensors, **others) + error  # type: ignore[arg-type, operator]

    monkeypatch.setattr(nsa_sel, "selection_attention", wrong)
    result = invoke("demo", "--out", tmp_path, *SMALL)
    assert result.exit_code == 1
    assert "error against the oracle: expected at most 0.0001" in flat(result.output)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--contexts", "4k,2k", "expected ascending lengths"),
        ("--contexts", "4k,4200", "tokens apart"),
        ("--contexts", "100", "the first at least"),
        ("--contexts", "4m", "got '4m'"),
        ("--contexts", "", "got ''"),
        ("--dtype", "int8", "'int8'"),
        ("--backend", "fastest", "'fastest'"),
        ("--device", "abacus", "got 'abacus'"),
        ("--device", "meta", "expected cpu or cuda"),
        ("--steps", "0", "--steps"),
    ],
)
def test_demo_refuses_bad_options(tmp_path: Path, option: str, value: str, expected: str) -> None:
    result = invoke("demo", "--out", tmp_path, option, value)
    assert result.exit_code == 2, result.output
    assert expected in flat(result.output)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_demo_names_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    result = invoke("demo", "--out", tmp_path, "--device", "cuda")
    assert result.exit_code == 2
    assert "expected a device that torch can use, got 'cuda'" in flat(result.output)


@pytest.mark.parametrize(
    ("text", "lengths"), [("4k", (4096,)), ("300,1k,65536", (300, 1024, 65536)), ("256,512", (256, 512))]
)
def test_contexts_are_read(text: str, lengths: tuple[int, ...]) -> None:
    assert demo_command.parse_contexts(text) == lengths


def test_info_prints_the_build_and_where_the_policy_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.json"
    policy.save(policy.Policy({"GPU": {"cuda": policy.Rule(True, 128)}}), path)
    with monkeypatch.context() as patched:
        patched.setenv("NSA_SEL_POLICY", str(path))
        patched.setenv("NSA_SEL_CUDA", "0")
        facts = json.loads(invoke("info", "--json").output)
        shown = flat(invoke("info").output)
    nsa_sel.refresh_routing()
    assert facts["build"] == nsa_sel.build_info()
    assert facts["policy"] == {"path": str(path), "exists": True}
    assert facts["switches"]["cuda"] is False
    assert len(facts["devices"]) == torch.cuda.device_count()
    assert nsa_sel.__version__ in shown
    assert str(path) in shown
    assert "cuda=False" in shown
    if not facts["devices"]:
        assert 'every call runs on backend "sdpa"' in shown
    if not facts["build"]["kernels"]:
        assert "none: " in shown


def test_info_shows_what_auto_runs_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up GPU: what is shown is routing's own word for it."""
    from types import SimpleNamespace

    from nsa_sel import execute

    properties = SimpleNamespace(name="Made Up 40", major=8, minor=9, multi_processor_count=128, total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    asked: list[object] = []

    def route(call: object) -> nsa_sel.Decision:
        asked.append(call)
        return nsa_sel.Decision("sdpa", "a reason to be shown")

    monkeypatch.setattr(execute, "route", route)
    shown = flat(invoke("info").output)
    for expected in ("0 Made Up 40", "8.9", "128", "NSA paper", "MiniMax-M3", "a reason to be shown"):
        assert expected in shown
    assert [(p.Dk, p.Dv, p.max_selected, p.device_type) for p in asked] == [  # type: ignore[attr-defined]
        (192, 128, 1024, "cuda"),
        (128, 128, 2048, "cuda"),
    ]


def test_info_names_a_switch_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("NSA_SEL_CUDA", "perhaps")
        result = invoke("info")
    nsa_sel.refresh_routing()
    assert result.exit_code == 2
    assert "NSA_SEL_CUDA" in result.output
    assert "'perhaps'" in result.output


@pytest.mark.parametrize(("library", "extra"), [("typer", "cli"), ("rich", "cli")])
def test_a_plain_install_says_which_extra_a_command_needs(
    monkeypatch: pytest.MonkeyPatch, library: str, extra: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(("nsa_sel.cli.", f"{library}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["nsa-sel", "info"])
    with pytest.raises(SystemExit) as stopped:
        nsa_sel.cli.main()
    assert f"nsa-sel[{extra}]" in str(stopped.value)
