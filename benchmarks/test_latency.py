"""A forward pass of the encoder."""

from __future__ import annotations

import pytest
import torch
from conftest import prepare

from fastadapt.bench import latency, verify
from fastadapt.bench.case import Case
from fastadapt.bench.methods import method as find_method
from fastadapt.bench.peers import PEERS
from fastadapt.bench.setup import Setup

MERGED = {"fastadapt-swapped", *(peer.merged for peer in PEERS.values())}


@pytest.mark.parametrize("system", [name for name, peer in PEERS.items() if peer.inference])
def test_latency(benchmark, system, method, dtype, batch, layers):
    if system in MERGED and not find_method(method).merges:
        pytest.skip(f"{method} has no merged form")
    torch._dynamo.reset()
    setup = Setup(Case(method=method, dtype=dtype, batch=batch, layers=layers))
    peer = PEERS[system]
    prepared = prepare(peer, "inference", setup)
    exact, yardstick = latency.references(setup)[peer.adapted]
    distance = verify.hidden_state_distance(prepared.hidden(prepared.call()), exact)
    verdict = verify.judge(distance, yardstick, peer.factor)
    assert verdict.correct, f"wrong, so not timed: {verdict}"
    benchmark.group = f"latency {method} {dtype} B={batch}"
    benchmark.pedantic(prepared.call, rounds=10, warmup_rounds=2)
