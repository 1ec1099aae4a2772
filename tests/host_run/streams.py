"""Several calls of the kernel at once: recorded into streams of the emulator, then run interleaved block by block."""

from __future__ import annotations

from collections.abc import Sequence

from tests.host_run.abi import library
from tests.host_run.kernel import Prepared, register


def run_streams(streams: Sequence[Sequence[Prepared]], seed: int) -> list[str]:
    """Run every stream's calls, in order within a stream; their outputs are written in place.

    Args:
        streams: calls that `prepare` made, each at most once, all of one library.
        seed: of the interleaving, and (modulo 3) the schedule of threads and copies.

    Returns:
        What the emulator found wrong: empty for a clean run.
    """
    calls = [call for stream in streams for call in stream]
    (key,) = {(call.options.kind, call.options.root) for call in calls}
    emulator, _ = library(*key)
    emulator.unregister_all()
    register(
        emulator,
        {f"{name}{i}": buffer for i, call in enumerate(calls) for name, buffer in call.buffers().items()},
    )
    emulator.reset(seed % 3)
    codes = []
    for number, stream in enumerate(streams):
        emulator.begin_stream(number)
        codes += [call.launch() for call in stream]
    emulator.run_streams(seed)
    return emulator.findings() + [f"launch: expected code 0, got {code}" for code in codes if code != 0]
