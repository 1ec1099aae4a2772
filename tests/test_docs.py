"""The documents: the README's code runs as it stands, and what it lists is what there is."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import nsa_sel
from nsa_sel.cli.app import app
from tests.kernel import table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCTESTED = (
    "nsa_sel", "nsa_sel._build", "nsa_sel.api", "nsa_sel.cli.demo", "nsa_sel.distributed", "nsa_sel.facts",
    "nsa_sel.integrations.vllm", "nsa_sel.merge", "nsa_sel.policy", "nsa_sel.quantize", "nsa_sel.ranges",
    "nsa_sel.reference", "nsa_sel.routing", "nsa_sel.stats", "nsa_sel.switches", "nsa_sel.testing",
)  # fmt: skip


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 120


def test_python_of_the_readme_runs_and_prints_what_it_says() -> None:
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks("python") + blocks("python", ARCHITECTURE):
            exec(compile(block, "README.md", "exec"), names)
    assert len(blocks("python")) == len(blocks("python", ARCHITECTURE)) == 1
    if not torch.cuda.is_available():
        assert [printed.getvalue()] == blocks("text")


@pytest.mark.slow
def test_quick_start_word_for_word_in_a_fresh_checkout(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*_out", ".*_cache")
    shutil.copytree(ROOT, checkout, ignore=left_out)
    commands, script = blocks("bash")[0], blocks("python")[0]
    (checkout / "script.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands + "\npython script.py"],
        cwd=checkout, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert (checkout / "demo_out" / "demo.png").exists()
    if not torch.cuda.is_available():
        assert result.stdout.endswith(blocks("text")[0])


COMPOSING = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs" / "composing.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.mark.parametrize("example", COMPOSING, ids=["window", "branches", "float8", "numpy", "jax", "graphs"])
def test_examples_of_merging_arrays_and_graphs_run(example: str) -> None:
    if "import jax" in example:
        pytest.importorskip("jax", reason="JAX is not installed (the extra `test` has it)")
    # In a process of its own: as a reader runs it, with no settings of PyTorch's compiler left over by another test.
    subprocess.run([sys.executable, "-c", example], check=True, timeout=300)


@pytest.mark.parametrize("name", DOCTESTED)
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    failures, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS, extraglobs=None)
    assert failures == 0
    if name == "nsa_sel.api":
        assert tried > 0


def test_public_functions_have_an_example() -> None:
    for name in nsa_sel.__all__:
        public = getattr(nsa_sel, name)
        if callable(public) and not isinstance(public, type) and name not in ("refresh_routing", "reset_stats"):
            assert ">>> " in (public.__doc__ or ""), f"{name}: expected an example in its docstring"


def test_commands_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "test-full", "wheel", "lint", "bench", "clean"} <= targets
    assert set(re.findall(r"`make ([a-z-]+)`", CONTRIBUTING)) <= targets
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"`nsa-sel ([a-z]+)", CONTRIBUTING)) == commands


def test_the_support_matrix_is_the_table_of_instances() -> None:
    assert table.shown_matrix() == table.generated_matrix(), "run: python -m tests.kernel.table"
    build = nsa_sel.build_info()
    if build["kernels"]:
        assert build["instances"] == nsa_sel._core.instances()


def test_every_variable_is_on_the_page_of_configuration() -> None:
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("cmake/*.cmake"), ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    # Read from the environment or given to CMake; the rest of the upper-case names are macros of the C++ code.
    used = {name for path in sources for name in re.findall(r"\bNSA_SEL_[A-Z_]+\b", path.read_text(encoding="utf-8"))}
    macros = {"NSA_SEL_HAS_KERNELS", "NSA_SEL_NO_KERNELS_REASON", "NSA_SEL_CUDA_VERSION", "NSA_SEL_VERSION"}
    macros.add("NSA_SEL_OLDEST_CUDA")
    assert used - macros == set(re.findall(r"\bNSA_SEL_[A-Z_]+\b", CONFIGURATION))


def test_the_list_of_files_is_complete_and_has_no_ghosts() -> None:
    listed: set[str] = set()
    for cell in re.findall(r"^\| (`[^|]+`) \|", ARCHITECTURE, re.MULTILINE):
        folder = ""
        for path in re.findall(r"`([^`]+)`", cell):
            # `a/b.py`, `c.py`: the second stands beside the first, unless it is found from the root
            path = folder + path if (ROOT / (folder + path)).exists() else path
            folder = path.rstrip("/").rpartition("/")[0] + "/" if "/" in path.rstrip("/") else ""
            assert (ROOT / path).exists(), path
            listed.add(path.rstrip("/"))
    outputs = {".git", ".venv", "build", "dist", "demo_out", "example_out", "bench_out", ".benchmarks", ".hypothesis"}
    unlisted = {"README.md", ".gitignore", ".clang-format", ".pre-commit-config.yaml"}
    top = {path.name for path in ROOT.iterdir() if not path.name.endswith("_cache")} - outputs - unlisted
    covered = {path.split("/")[0] for path in listed}
    assert top - covered == set()
    package = {path.name for path in (ROOT / "src" / "nsa_sel").iterdir() if not path.name.startswith("__")}
    in_package = {path.split("/")[2] for path in listed if path.startswith("src/nsa_sel/")}
    assert {name for name in package if not name.endswith((".so", ".typed"))} - in_package == set()


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)}: {target}"


def test_pins_of_the_formatters_agree() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for tool in ("ruff", "clang-format"):
        (pin,) = re.findall(rf"\"{tool}==([\d.]+)", project)
        assert set(re.findall(rf"\[{tool}==([\d.]+)\]", hooks)) == {pin}


def test_the_kernels_compiler_is_pinned_the_same_everywhere() -> None:
    pin = re.compile(r"nvidia-cuda-\w+-cu12==[\d.]+")
    in_project = pin.findall((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert len(set(in_project)) == 3
    assert sorted(in_project) == sorted([*set(in_project)] * 2)  # the isolated build's and the extra dev's
    assert set(pin.findall((ROOT / "Makefile").read_text(encoding="utf-8"))) == set(in_project)
