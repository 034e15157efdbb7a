"""A whole optimizer step."""

from __future__ import annotations

import pytest
from conftest import prepare

from fastadapt.bench import train
from fastadapt.bench.case import Case
from fastadapt.bench.peers import PEERS
from fastadapt.bench.setup import Setup


@pytest.mark.parametrize("system", [name for name, peer in PEERS.items() if peer.training])
def test_train(benchmark, system, method, dtype, batch, layers):
    case = Case(method=method, dtype=dtype, batch=batch, layers=layers)
    peer = PEERS[system]
    prepared = prepare(peer, "training", Setup(case, classifier=True))
    for name, verdict in train.judge_gradients(case, [peer]).items():
        assert verdict.correct, f"{name} is wrong, so it is not timed: {verdict}"
    benchmark.group = f"train {method} {dtype} B={batch}"
    benchmark.extra_info["saved_bytes_per_layer"] = train.saved_bytes_per_layer(case, [peer])[system]
    benchmark.pedantic(prepared.step, rounds=5, warmup_rounds=1)
