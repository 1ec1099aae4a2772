"""Options of the pytest-benchmark suites: which workloads, on which device."""

from __future__ import annotations

import pytest
import torch

from nsa_sel.measure.run.environment import environment, tf32_off
from nsa_sel.measure.run.session import device_of
from nsa_sel.measure.run.workload import load_suites

VOLATILE = ("time", "command", "commit", "clocks")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --suite and --device."""
    parser.addoption("--suite", default="ci", help="plan, decode, models, ci or TOML files, with commas; default ci")
    parser.addoption("--device", default="", help="cpu, cuda or cuda:N; by default cuda where there is one")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once for every workload of the suites."""
    if "workload" in metafunc.fixturenames:
        workloads = load_suites(metafunc.config.getoption("--suite").split(","))
        metafunc.parametrize("workload", workloads, ids=[workload.name for workload in workloads], scope="module")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    """Store what `nsa-sel bench` stores of the machine beside what pytest-benchmark knows."""
    tf32_off()
    known = environment(device_of(config.getoption("--device")))
    # What differs from run to run on one machine would make every comparison warn of another machine.
    machine_info["nsa_sel"] = {name: value for name, value in known.items() if name not in VOLATILE}
    cpu = machine_info.get("cpu")
    if isinstance(cpu, dict):  # the clock of the moment, for the same reason
        machine_info["cpu"] = {name: value for name, value in cpu.items() if not name.startswith("hz_actual")}


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Return the device."""
    return device_of(pytestconfig.getoption("--device"))
