"""The compiled module as it was shipped: its machine code, what it links, what it exports, and the build's switches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

import nsa_sel
from nsa_sel.facts import Key, find_cuobjdump, kernel_of_symbol
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
def test_machine_code_is_of_the_compilers_cuda_and_says_which_driver_it_needs(tmp_path: Path) -> None:
    major = int(BUILD["cuda_version"].split(".")[0])
    assert BUILD["compiler"] == f"NVRTC {BUILD['cuda_version']}"
    assert BUILD["oldest_driver"] == {12: "525 (CUDA 12.0)", 13: "580 (CUDA 13.0)"}[major]
    subprocess.run([str(find_cuobjdump()), "-xelf", "all", str(module_file())], cwd=tmp_path, check=True)
    files = list(tmp_path.glob("*.cubin"))
    assert files
    assert {file.read_bytes()[8] for file in files} == {{12: 7, 13: 8}[major]}  # the ABI version of the ELF header


@with_kernels
def test_no_cuda_runtime_is_in_the_module() -> None:
    content = module_file().read_bytes()
    for name in (b"cudaGetDevice", b"cudaLaunchKernel", b"cudart", b"__cudaRegisterFatBinary"):
        assert name not in content
    assert b"cuGetProcAddress_v2" in content  # such names would be seen: this one is looked up


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
    assert functions == (len(BUILD["instances"]) + 2) * len(BUILD["architectures"])  # and combine for two dtypes
    expected = Counter(
        Key(*(i[name] for name in ("dtype", "Dk", "Dv", "head_tile", "loads", "cache"))) for i in BUILD["instances"]
    )
    assert {name: Counter(found) for name, found in kernels.items()} == dict.fromkeys(BUILD["architectures"], expected)


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_module_links_neither_torch_nor_cuda_and_exports_its_entry_alone() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "--dynamic", module_file()))
    allowed = r"(libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux-\w+([-_]\w+)*)\.so(\.\d+)*"
    assert needed
    assert [library for library in needed if not re.fullmatch(allowed, library)] == []
    symbols = run("nm", "--dynamic", "--defined-only", module_file()).split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["PyInit__core"]


def obeying_modes() -> list[str]:
    """Return what a command begins with so that it may write only where files' modes let it, root or not."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv: root writes where it likes")
    return ["setpriv", "--bounding-set", "-dac_override"]


def configure(
    build: Path, *options: str, source: Path = ROOT, prefix: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run CMake's configure step alone, as the package's build would."""
    import pybind11

    command = [
        *prefix, "cmake", "-S", source, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        "-DSKBUILD_PROJECT_VERSION=0", "-DSKBUILD_PROJECT_VERSION_FULL=0", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
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


def without_nvrtc(folder: Path) -> Path:
    """Return a Python that sees pybind11 and no compiler."""
    import pybind11

    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "pybind11").symlink_to(Path(pybind11.__file__).parent)
    return python


BROKEN = {"CUDA_HOME": "/nonexistent", "CUDA_PATH": ""}


def test_without_a_compiler_the_build_goes_on_and_says_why_unless_kernels_are_required(tmp_path: Path) -> None:
    python = f"-DPython_EXECUTABLE={without_nvrtc(tmp_path / 'env')}"
    result = configure(tmp_path / "build", python, "-DPython_FIND_VIRTUALENV=ONLY", **BROKEN)
    assert result.returncode == 0, result.stderr
    rules = (tmp_path / "build" / "build.ninja").read_text()
    assert "NSA_SEL_HAS_KERNELS=0" in rules
    assert "expected NVRTC 12.9 (nvidia-cuda-nvrtc-cu12" in rules  # what build_info() will repeat
    result = configure(tmp_path / "build", python, "-DNSA_SEL_REQUIRE_KERNELS=ON", **BROKEN)
    assert result.returncode != 0
    assert re.search(r"NSA_SEL_REQUIRE_KERNELS:\s+expected\s+NVRTC\s+12.9", result.stderr), result.stderr


def test_a_broken_compiler_is_named(tmp_path: Path) -> None:
    python = without_nvrtc(tmp_path / "env")
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    library = packages / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"no library")
    result = configure(tmp_path / "build", f"-DPython_EXECUTABLE={python}", "-DNSA_SEL_REQUIRE_KERNELS=ON", **BROKEN)
    assert result.returncode != 0
    assert re.search(r"libnvrtc.so.12\s+does\s+not\s+load", result.stderr), result.stderr


def test_kernels_that_are_not_wanted_are_not_built(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DNSA_SEL_WITHOUT_KERNELS=ON")
    assert result.returncode == 0, result.stderr
    rules = (tmp_path / "build.ninja").read_text()
    assert "NSA_SEL_HAS_KERNELS=0" in rules
    assert ".cubin" not in rules


needs_nvrtc = pytest.mark.skipif(not BUILD["kernels"], reason="no NVRTC was found when this build was made")


@needs_nvrtc
def test_architectures_are_checked_and_native_is_what_the_driver_names(tmp_path: Path) -> None:
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    driver.chmod(0o755)
    result = configure(tmp_path / "build", "-DNSA_SEL_ARCHITECTURES=native", PATH_FIRST=str(driver.parent))
    assert result.returncode == 0, result.stderr
    rules = (tmp_path / "build" / "build.ninja").read_text()
    assert set(re.findall(r"kernels/\w+\.(\d+\.(?:cubin|ptx))", rules)) == {"86.cubin", "90.cubin", "90.ptx"}
    assert 'NSA_SEL_ARCHITECTURES=\\"86;90\\"' in rules.replace('"\\"', '\\"')

    # The same folder again: the compiler need not be looked for a second time.
    driver.write_text("#!/bin/sh\nexit 9\n")
    result = configure(tmp_path / "build", "-DNSA_SEL_ARCHITECTURES=native", PATH_FIRST=str(driver.parent))
    assert result.returncode != 0
    assert "NSA_SEL_ARCHITECTURES=native" in result.stderr
    for wrong, got in (("75;90", "got '75'"), ("sm_90", "got 'sm_90'"), ("", "got nothing")):
        result = configure(tmp_path / "build", f"-DNSA_SEL_ARCHITECTURES={wrong}")
        assert result.returncode != 0
        assert re.search(r"NSA_SEL_ARCHITECTURES:\s+expected\s+'native'", result.stderr)
        assert got in " ".join(result.stderr.split())


# 256 values that live through a loop and may have 32 registers.
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) planted(float* p) {
  float x[256];
  for (int i = 0; i < 256; ++i) x[i] = p[i * 1024 + threadIdx.x];
  for (int k = 0; k < 64; ++k)
    for (int i = 0; i < 256; ++i) x[i] = x[i] * x[(i + 1) % 256] + p[k];
  for (int i = 0; i < 256; ++i) p[i * 1024 + threadIdx.x] = x[i];
}
"""


def planted_sources(folder: Path, kernel: str) -> Path:
    """Copy the build's files, with one kernel that is none of ours."""
    folder.mkdir()
    for name in ("CMakeLists.txt", "cmake", "cpp", "python"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "cuda" / "instances").mkdir(parents=True)
    (folder / "cuda" / "instances" / "planted.cu").write_text(kernel)
    return folder


def build_images(build: Path, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Build the packed machine code alone."""
    command = [*prefix, "cmake", "--build", str(build), "--target", "nsa_sel_images"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_nvrtc
@pytest.mark.parametrize("spills", [False, True])
def test_a_spill_fails_the_build(tmp_path: Path, spills: bool) -> None:
    source = planted_sources(tmp_path / "source", SPILLING if spills else SPILLING.replace("256", "8"))
    result = configure(tmp_path / "build", "-DNSA_SEL_ARCHITECTURES=80;90", source=source)
    assert result.returncode == 0, result.stderr
    result = build_images(tmp_path / "build")
    printed = result.stdout + result.stderr
    assert result.returncode == 0 or spills, printed
    assert ("spill" in printed) == (result.returncode != 0) == spills, printed


@needs_nvrtc
def test_only_what_changed_is_compiled_again_in_folders_of_any_name_and_a_source_tree_that_is_read_only(
    tmp_path: Path,
) -> None:
    kernel = '#include "own.cuh"\nextern "C" __global__ void planted(float* p) { p[0] = kValue; }\n'
    source = planted_sources(tmp_path / 'it\'s a "source"', kernel)
    instances = source / "cuda" / "instances"
    (instances / "own.cuh").write_text("constexpr float kValue = 1.0f;\n")
    (instances / "other.cu").write_text('extern "C" __global__ void other(float* p) { p[0] = 2.0f; }\n')
    for path in [source, *source.rglob("*")]:
        path.chmod(0o555)
    prefix = obeying_modes()
    refused = subprocess.run([*prefix, "touch", str(source / "x")], capture_output=True, text=True, check=False)
    assert "Permission denied" in refused.stderr, "the source tree can be written to"
    build = tmp_path / "a 'build' folder"
    result = configure(build, "-DNSA_SEL_ARCHITECTURES=80", source=source, prefix=prefix)
    assert result.returncode == 0, result.stderr
    result = build_images(build, prefix)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Compiling planted.cu" in result.stdout
    assert "no work to do" in build_images(build, prefix).stdout
    (instances / "own.cuh").chmod(0o644)
    (instances / "own.cuh").write_text("constexpr float kValue = 3.0f;\n")
    result = build_images(build, prefix)
    assert "Compiling planted.cu" in result.stdout
    assert "Compiling other.cu" not in result.stdout
    assert "planted" in (build / "kernels" / "images.cpp").read_text()


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
