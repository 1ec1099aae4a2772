"""The compiled module as it was shipped: its machine code, what it links, what it exports, and the build's switches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import nsa_sel
from nsa_sel.facts import Key, kernel_of_symbol
from tests.kernel.sass import cuobjdump, module_file

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "86", "89", "90")
BUILD = nsa_sel.build_info()

with_kernels = pytest.mark.skipif(not BUILD["kernels"], reason=f"this build has no kernels: {BUILD['reason']}")


def run(*command: str | Path, **environment: str) -> str:
    """Return what a command that must succeed printed."""
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == 0, f"{command}:\n{result.stdout}{result.stderr}"
    return result.stdout


@with_kernels
def test_machine_code_for_every_architecture_and_ptx_of_the_last() -> None:
    built = tuple(BUILD["architectures"])
    elf = cuobjdump("--list-elf")
    assert tuple(sorted(set(re.findall(r"\.sm_(\w+)\.cubin", elf)))) == built
    ptx = cuobjdump("--list-ptx")
    assert set(re.findall(r"\.sm_(\w+)\.ptx", ptx)) == {built[-1]}
    if "NSA_SEL_ARCHITECTURES" not in os.environ:  # a build for one machine says so by this variable
        assert built == ARCHITECTURES


@with_kernels
def test_every_kernel_is_there_once_per_architecture_and_none_uses_the_stack() -> None:
    report = cuobjdump("--dump-resource-usage")
    kernels: dict[str, list[Key]] = {}
    architecture = ""
    functions = 0
    for line in report.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            functions += 1
            kernel = kernel_of_symbol(match[1])
            if kernel is not None:
                kernels.setdefault(architecture, []).append(kernel)
        elif "STACK:" in line:
            assert "STACK:0 " in line, f"sm_{architecture}: {line.strip()}"  # spills show here, not in LOCAL
            assert "LOCAL:0 " in line, f"sm_{architecture}: {line.strip()}"
    assert functions > 0
    expected = Counter(Key(i["dtype"], i["Dk"], i["Dv"], i["head_tile"], i["loads"]) for i in BUILD["instances"])
    assert {name: Counter(found) for name, found in kernels.items()} == dict.fromkeys(BUILD["architectures"], expected)


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_module_links_neither_torch_nor_cuda_and_exports_its_entry_alone() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "--dynamic", module_file()))
    allowed = r"(libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux-\w+([-_]\w+)*)\.so(\.\d+)*"
    assert needed
    assert [library for library in needed if not re.fullmatch(allowed, library)] == []
    symbols = run("nm", "--dynamic", "--defined-only", module_file()).split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["PyInit__core"]


def configure(build: Path, *options: str, source: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run CMake's configure step alone, as the package's build would."""
    import pybind11

    command = [
        "cmake", "-S", source, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DSKBUILD_PROJECT_VERSION=0",
        "-DSKBUILD_PROJECT_VERSION_FULL=0", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}", *options,
    ]  # fmt: skip
    path = os.pathsep.join([environment.pop("PATH_FIRST", ""), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, "NSA_SEL_SYSTEM_CUDA": "true", **environment, "PATH": path.lstrip(os.pathsep)},
        check=False,
    )


def test_switches_that_contradict_each_other_stop_the_build(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DNSA_SEL_WITHOUT_KERNELS=ON", "-DNSA_SEL_REQUIRE_KERNELS=ON")
    assert result.returncode != 0
    assert "NSA_SEL_WITHOUT_KERNELS and NSA_SEL_REQUIRE_KERNELS" in result.stderr


def test_without_a_working_compiler_the_build_goes_on_and_says_why(tmp_path: Path) -> None:
    result = configure(tmp_path, CUDACXX="/nonexistent/nvcc")
    assert result.returncode == 0, result.stderr
    rules = (tmp_path / "build.ninja").read_text()
    assert "NSA_SEL_HAS_KERNELS=0" in rules
    assert "the CUDA compiler /nonexistent/nvcc does not work" in rules  # what build_info() will repeat


def test_kernels_that_are_required_and_cannot_be_built_stop_the_build(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DNSA_SEL_REQUIRE_KERNELS=ON", CUDACXX="/nonexistent/nvcc")
    assert result.returncode != 0
    assert re.search(r"NSA_SEL_REQUIRE_KERNELS:\s+the CUDA compiler\s+/nonexistent/nvcc", result.stderr)


def test_kernels_that_are_not_wanted_are_not_built(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DNSA_SEL_WITHOUT_KERNELS=ON")
    assert result.returncode == 0, result.stderr
    rules = (tmp_path / "build.ninja").read_text()
    assert "NSA_SEL_HAS_KERNELS=0" in rules
    assert ".cu.o" not in rules


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH to configure with")


@needs_nvcc
def test_architectures_are_checked_and_native_is_what_the_driver_names(tmp_path: Path) -> None:
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    driver.chmod(0o755)
    result = configure(tmp_path / "build", "-DNSA_SEL_ARCHITECTURES=native", PATH_FIRST=str(driver.parent))
    assert result.returncode == 0, result.stderr
    rules = (tmp_path / "build" / "build.ninja").read_text()
    assert set(re.findall(r"code=\[(\w+)\]", rules)) == {"sm_86", "sm_90", "compute_90"}
    assert 'NSA_SEL_ARCHITECTURES=\\"86;90\\"' in rules.replace('"\\"', '\\"')

    # The same folder again: the compiler need not be looked for a second time.
    driver.write_text("#!/bin/sh\nexit 9\n")
    result = configure(tmp_path / "build", "-DNSA_SEL_ARCHITECTURES=native", PATH_FIRST=str(driver.parent))
    assert result.returncode != 0
    assert "NSA_SEL_ARCHITECTURES=native" in result.stderr
    result = configure(tmp_path / "build", "-DNSA_SEL_ARCHITECTURES=75;90")
    assert result.returncode != 0
    assert "got '75'" in result.stderr


# 256 values that live through a loop and may have 32 registers.
SPILLING = """
__global__ void __launch_bounds__(1024, 2) planted(float* p) {
  float x[256];
  for (int i = 0; i < 256; ++i) x[i] = p[i * 1024 + threadIdx.x];
  for (int k = 0; k < 64; ++k)
    for (int i = 0; i < 256; ++i) x[i] = x[i] * x[(i + 1) % 256] + p[k];
  for (int i = 0; i < 256; ++i) p[i * 1024 + threadIdx.x] = x[i];
}
"""


@needs_nvcc
@pytest.mark.parametrize("spills", [False, True])
def test_a_spill_fails_the_build(tmp_path: Path, spills: bool) -> None:
    for name in ("CMakeLists.txt", "cmake", "cpp", "python"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "planted.cu").write_text(SPILLING if spills else SPILLING.replace("256", "8"))
    result = configure(tmp_path / "build", "-DNSA_SEL_ARCHITECTURES=80;90", source=tmp_path)
    assert result.returncode == 0, result.stderr
    cmake = ["cmake", "--build", str(tmp_path / "build"), "--target", "nsa_sel_kernels"]
    result = subprocess.run(cmake, capture_output=True, text=True, check=False)
    printed = result.stdout + result.stderr
    assert result.returncode == 0 or spills, printed
    assert ("spill" in printed) == (result.returncode != 0) == spills, printed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the package index has no CUDA compiler for this system")
def test_a_wheel_from_a_clean_environment_holds_the_kernels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist", "*_out", ".*_cache"))
    path = os.pathsep.join(["/usr/bin", "/bin"])  # no nvcc of the system, no cmake of this environment
    clean = {"PATH": path, "CUDA_HOME": "", "CUDACXX": "", "NSA_SEL_SYSTEM_CUDA": "", "NSA_SEL_REQUIRE_KERNELS": "ON"}
    run(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--wheel-dir", tmp_path / "dist", **clean)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size < 20e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert {"nsa_sel/__init__.py", "nsa_sel/py.typed", "nsa_sel/_core.pyi"} <= set(names)
    assert not [name for name in names if name.endswith((".cu", ".cuh", ".h", ".cpp", ".a", ".pyc"))]
    # In a process of its own, without torch: the compiled module needs neither a driver nor anything of this package.
    (module,) = (tmp_path / "installed" / "nsa_sel").glob("_core*.so")
    script = (
        "import importlib.util as u, json, sys; s = u.spec_from_file_location('nsa_sel._core', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); i = m.build_info(); assert 'torch' not in sys.modules; "
        "print(i['kernels'], list(i['architectures']))"
    )
    assert run(sys.executable, "-S", "-c", script, module).strip() == f"True {list(ARCHITECTURES)}"
