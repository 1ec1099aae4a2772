"""The compiled part of nsa_sel: launch planning and, where built with them, the CUDA kernels."""

from typing import Any

class DeviceLimits:
    """What planning needs to know of a GPU."""

    sm_count: int
    capability: int
    smem_per_block: int
    smem_per_sm: int
    def __init__(self, *, sm_count: int, capability: int, smem_per_block: int, smem_per_sm: int) -> None: ...

class DecodeLaunch:
    """One planned launch; `run` puts it on a stream."""

    workspace_floats: int
    plan: dict[str, Any]
    def __init__(
        self,
        *,
        device: DeviceLimits,
        dtype: int,
        shape: tuple[int, ...],
        pointers: tuple[int, ...],
        q_strides: tuple[int, ...],
        k_strides: tuple[int, ...],
        v_strides: tuple[int, ...],
        out_strides: tuple[int, ...],
        sel_strides: tuple[int, ...],
        list_strides: tuple[int, ...],
        pages: tuple[int, int],
        block_size: int,
        index_is_64: bool,
        causal: bool,
        scale: float,
        max_selected: int,
        batch_invariant: bool,
        num_splits: int,
        loads: str = ...,
    ) -> None: ...
    def run(self, workspace: int, device: int, stream: int) -> int: ...

def build_info() -> dict[str, Any]: ...
def tile_shape(Dk: int, Dv: int, head_tile: int, loads: str = "cp.async") -> dict[str, int]: ...
def bytes_in_flight_needed(capability: int) -> int: ...
def driver_bar() -> str | None: ...
def driver_version() -> int: ...
def kernel_bar(device: int, instance: int) -> str | None: ...
def forget_kernel_bars() -> None: ...
def device_limits(device: int) -> DeviceLimits: ...
def error_string(code: int) -> str: ...
def is_refusal(code: int) -> bool: ...
