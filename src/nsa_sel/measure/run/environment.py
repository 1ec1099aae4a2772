"""What a measurement was made with: device, clocks, driver, versions, commit, command line."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import nsa_sel
from nsa_sel.measure.commit import commit

_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def tf32_off() -> None:
    """Turn TF32 off: with it, a baseline in fp32 would quietly compute in 10-bit mantissas."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def device_columns(device: torch.device) -> dict[str, str]:
    """Return the columns device, sm and commit. Without a GPU, sm is "cpu", which no gate takes for measured."""
    if device.type != "cuda":
        return {"device": f"CPU {_cpu_name()}", "sm": "cpu", "commit": commit()}
    major, minor = torch.cuda.get_device_capability(device)
    return {"device": torch.cuda.get_device_name(device), "sm": f"{major}{minor}", "commit": commit()}


def environment(device: torch.device, **more: Any) -> dict[str, Any]:
    """Return everything known about this machine and run, as plain values."""
    found: dict[str, Any] = {
        **device_columns(device),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "nsa_sel": nsa_sel.__version__,
        "kernels": nsa_sel.build_info()["kernels"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads() if device.type == "cuda" else 1,  # what is timed on a CPU runs on one
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32),
        "switches": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NSA_SEL_")},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "sm_count": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda or "",
            **_driver(device),
        }
    return found | more


def clocks(device: torch.device) -> dict[str, int] | None:
    """Return the clocks in MHz of a GPU's multiprocessors and memory right now; None where the driver names none."""
    if device.type != "cuda" or (found := _nvml(device)) is None:
        return None
    library, handle = found
    values = {}
    for name, kind in (("sm", 1), ("mem", 2)):  # NVML_CLOCK_SM, NVML_CLOCK_MEM
        value = ctypes.c_uint()
        if library.nvmlDeviceGetClockInfo(handle, kind, ctypes.byref(value)) != 0:
            return None
        values[name] = value.value
    return values


@functools.cache
def _nvml(device: torch.device) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    # The driver's own library: reading a clock through it takes microseconds, through nvidia-smi a process each.
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    found = library.nvmlInit_v2() == 0 and library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)) == 0
    return (library, handle) if found else None


def _driver(device: torch.device) -> dict[str, Any]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"driver": "unknown: no nvidia-smi"}
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = [f"--id=GPU-{uuid}"] if uuid else []
    fields = ("driver_version", *_CLOCKS)
    done = subprocess.run(
        [tool, *chosen, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not done.stdout.strip():
        return {"driver": f"unknown: nvidia-smi ended with {done.returncode}"}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    named = dict(zip(fields, values, strict=False))
    return {"driver": named.pop("driver_version", "unknown"), "clocks": named}


@functools.cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
