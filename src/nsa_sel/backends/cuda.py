"""The compiled CUDA kernel: hands a checked call to `_core` and allocates what it writes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from nsa_sel import _build, devices
from nsa_sel._build import BuildInfo
from nsa_sel.backends import _request
from nsa_sel.call import Call
from nsa_sel.devices import DeviceInfo
from nsa_sel.errors import KernelLaunchError, PlanError

core: Any = _build.core
_OUT_ALIGNMENT = 8  # bytes: merged splits are written four 16-bit columns at once

if core is not None and tuple(core.request_fields()) != _request.FIELDS:
    raise ImportError(f"nsa_sel._core: expected a DecodeRequest of {_request.FIELDS}, got {core.request_fields()}")


@functools.cache
def device_limits(index: int) -> Any:
    """Return the `_core.DeviceLimits` of a GPU."""
    return core.device_limits(index)


def limits(call: Call, device: DeviceInfo | None) -> str | None:
    """Say why the kernel cannot run this call on this device, or None."""
    if call.device_type != "cuda" or device is None:
        return f"tensors on {call.device_type}"
    if call.dtype not in _request.DTYPES:
        return f"no kernel takes {call.dtype}"
    if call.requires_grad:
        return "gradients required"
    build = _build.routing_build()
    if not build.kernels:
        return _no_kernels(build)
    if _instance(call) is None:
        cache = _request.cache_of(call)
        found = f"{call.dtype} Dk={call.Dk} Dv={call.Dv} h={call.h}" + (f" {cache} cache" if cache != "same" else "")
        return f"no kernel compiled for {found} (its dims are multiples of 64; build_info() lists them)"
    return _no_image(build, device) or kernel_limits(call) or _driver_bar(call)


def unusable(call: Call) -> str | None:
    """Say why this build, driver and GPU do not go together for a call that the kernel could take, or None."""
    build = _build.routing_build()
    if not build.kernels:
        return _no_kernels(build)
    return _no_image(build, devices.info(call.device_index)) or _driver_bar(call)


def _no_kernels(build: BuildInfo) -> str:
    return f"this build has no kernels: {build.reason}"


def _no_image(build: BuildInfo, device: DeviceInfo) -> str | None:
    if build.runs_on(device.capability):
        return None
    return f"no kernel compiled for compute capability {device.capability[0]}.{device.capability[1]}"


def _driver_bar(call: Call) -> str | None:
    """Load the call's kernels unless they are, and say why driver, GPU and build do not go together, or None."""
    index = _kernel_indices().get(kernel_name(call))
    return None if index is None else core.kernel_bar(call.device_index, index)


@functools.cache
def _kernel_indices() -> dict[str, int]:
    return {instance["name"]: index for index, instance in enumerate(_build.build_info()["instances"])}


def kernel_limits(call: Call) -> str | None:
    """Say what of its sizes and strides the kernel's own arithmetic cannot take, or None."""
    for name in ("S_kv", "n", "num_pages", "num_tables"):
        if getattr(call, name) > _request.MOST:
            return f"{name} is {getattr(call, name)}, the kernel takes up to {_request.MOST}"
    return call.misaligned() or call.unreadable()


def _instance(call: Call) -> _build.Instance | None:
    return _build.routing_build().instance_for(call.dtype, call.Dk, call.Dv, call.h, _request.cache_of(call))


def kernel_name(call: Call) -> str:
    """Return the name of the instance that runs a call which `limits` has nothing against."""
    instance = _instance(call)
    return "" if instance is None else instance.name


def plan(
    call: Call, out: torch.Tensor, lse: torch.Tensor | None, limits: Any, num_splits: int = 0, loads: str = "cp.async"
) -> Any:
    """Return the `_core.DecodeLaunch` of a call; arguments as `_request.pack` and the device's `_core.DeviceLimits`."""
    try:
        return core.DecodeLaunch(_request.pack(call, out, lse, num_splits, loads), limits)
    except ValueError as error:
        raise PlanError(str(error)) from None


def offer(call: Call, launch: Any) -> None:
    """Offer the launch of a call that runs for later calls with the same signature."""
    shape = (call.B, call.S, call.G, call.h, call.Dv)
    like_q = call.Dk == call.Dv and call.q.is_contiguous()
    core.offer_launch(launch, call.device_index, shape, like_q, _float32(call.q.device))


@functools.cache
def _float32(device: torch.device) -> torch.Tensor:
    """Return an empty tensor: its `new_empty` is the cheapest way to more of its kind."""
    return torch.empty(0, dtype=torch.float32, device=device)


def _row_aligned(out: torch.Tensor) -> bool:
    step = _OUT_ALIGNMENT // out.element_size()
    return (
        out.data_ptr() % _OUT_ALIGNMENT == 0 and all(s % step == 0 for s in out.stride()[:-1]) and out.stride(-1) == 1
    )


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the kernel on the current stream; no host synchronisation, no allocation besides out, lse and workspace.

    Returns:
        out [B, S, G, h, Dv] in q's dtype; lse [B, S, G, h] fp32 or None.

    Raises:
        PlanError: strides that reach beyond 2^32 row offsets, or more than 2^31 work items.
        KernelLaunchError: the device refused the launch and can go on (the caller may fall back).
        RuntimeError: any other CUDA error: a lost context, a broken capture, no memory.
    """
    index = call.device_index
    shape = (call.B, call.S, call.G, call.h)
    with devices.current(index):
        target = call.out
        if target is None or not _row_aligned(target):
            out = call.q.new_empty(call.B, call.S, call.G, call.h, call.Dv)  # the quickest to parse
        else:
            out = target
        lse = _float32(call.q.device).new_empty(shape) if call.return_lse else None
        if out.numel() > 0:
            launch = plan(call, out, lse, device_limits(index))
            workspace = None
            if launch.workspace_floats > 0:
                workspace = _float32(call.q.device).new_empty(launch.workspace_floats)
            code = launch.run(0 if workspace is None else workspace.data_ptr(), index, devices.stream(index))
            if code != 0:
                message = f"decode kernel on {devices.info(index).name}: {core.error_string(code)}"
                raise KernelLaunchError(message) if core.is_refusal(code) else RuntimeError(message)
            if target is None or target is out:
                offer(call, launch)
        if target is not None and target is not out:
            target.copy_(out)
            out = target
        return out, lse
