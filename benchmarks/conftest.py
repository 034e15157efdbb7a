"""The pytest-benchmark suite: the cases of `fastadapt bench`, one test a system, through the same setup functions.

    pytest benchmarks --benchmark-group-by=group
    pytest benchmarks --layers 2 --batches 1 -k fp32

Here each system runs on its own; ratios of systems that take turns come from `fastadapt bench`.
"""

from __future__ import annotations

import pytest

from fastadapt.bench.setup import use_all_cores


def pytest_addoption(parser):
    group = parser.getgroup("fastadapt")
    group.addoption("--layers", type=int, default=4, help="encoder layers (4)")
    group.addoption("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes (1 8 32)")
    group.addoption("--methods", nargs="+", default=["houlsby"], help="adapter methods (houlsby)")


def pytest_configure(config):
    use_all_cores()


def pytest_generate_tests(metafunc):
    for name, option in (("batch", "batches"), ("method", "methods")):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, metafunc.config.getoption(option))
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", ["fp32", "bf16"])


@pytest.fixture
def layers(request):
    return request.config.getoption("layers")


def prepare(peer, job, setup):
    """The system to time; skips where its package is missing or it cannot serve the case."""
    from fastadapt.errors import UserError

    if peer.missing():
        pytest.skip(peer.missing())
    try:
        return peer.setup(job, setup)
    except UserError as refusal:
        pytest.skip(str(refusal))
