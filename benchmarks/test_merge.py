"""Merge, swap and unmerge of LoRA on all six linears, and a copy of as many bytes."""

from __future__ import annotations

import pytest
import torch
from conftest import prepare

from fastadapt.bench import merge
from fastadapt.bench.case import Case
from fastadapt.bench.peers import PEERS
from fastadapt.bench.setup import Setup


@pytest.mark.parametrize("step", merge.STEPS)
@pytest.mark.parametrize("system", [name for name, peer in PEERS.items() if peer.merging])
def test_merge(benchmark, system, step, dtype, layers):
    setup = Setup(Case(method="lora", dtype=dtype, batch=1, layers=layers))
    peer = PEERS[system]
    prepared = prepare(peer, "merging", setup)
    verdict = merge.judge(setup, prepared, peer.factor, exact=peer.ours)
    assert verdict.correct, f"wrong, so not timed: {verdict}"
    benchmark.group = f"{step}, r=8, {dtype}, {layers} layers"
    before = {"merge": [], "swap": [prepared.merge], "unmerge": [prepared.merge]}[step]
    after = {"merge": [prepared.unmerge], "swap": [prepared.unmerge], "unmerge": []}[step]

    def run(calls):
        for call in calls:
            call()

    benchmark.pedantic(
        getattr(prepared, step), setup=lambda: run(before), teardown=lambda: run(after), rounds=10, warmup_rounds=1
    )


def test_copy(benchmark, dtype, layers):
    case = Case(method="lora", dtype=dtype, batch=1, layers=layers)
    setup = Setup(case)
    sources = [m.clone() for m in setup.method.matrices(setup.stock(case.torch_dtype), case).values()]
    targets = [torch.zeros_like(source) for source in sources]

    def copy():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    benchmark.group = f"copy of as many bytes, {dtype}, {layers} layers"
    benchmark.pedantic(copy, rounds=10, warmup_rounds=1)
