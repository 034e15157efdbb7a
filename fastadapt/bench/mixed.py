"""Inference of several tasks at once: a batch whose rows have tasks of their own, or one text of many tasks.

The tasks are of one method and size, with weights of their own. Mixed: they take turns from row to row, against the
same batch with one task for all; PEFT's own form (``adapter_names``) is a peer for LoRA. Shared: every text has all
tasks, which share the layers below the lowest adapted one, against one task after the other. Ours enters ``fa.route``
anew in every call, as a server does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.bench import measure, report, verify
from fastadapt.bench.case import Case
from fastadapt.bench.methods.base import Tensors
from fastadapt.bench.peers import PEERS
from fastadapt.bench.setup import Setup
from fastadapt.console import Progress, megabytes

# system -> (label, the system that it is compared with)
SYSTEMS = {
    "fastadapt": ("fastadapt, one task for all", "fastadapt"),
    "fastadapt-mixed": ("fastadapt, mixed", "fastadapt"),
    "peft": ("PEFT, one task for all", "peft"),
    "peft-mixed": ("PEFT, mixed", "peft"),
    "fastadapt-alone": ("fastadapt, task after task", "fastadapt-alone"),
    "fastadapt-shared": ("fastadapt, tasks of a text together", "fastadapt-alone"),
}
METHODS = ("houlsby", "pfeiffer", "parallel", "adapterdrop", "lora", "bitfit")
Rows = Sequence[tuple[int, int]]  # (number of the text, task) of every row of the output


def _name(task: int) -> str:
    return f"task{task}"


def _weights(setup: Setup, task: int) -> Tensors:
    return {name: value.roll(task, 0) for name, value in setup.weights.items()}


def _plain(setup: Setup, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Last hidden states of ``rows``, in plain PyTorch, task by task."""
    out: Tensor | None = None
    for task in sorted({task for _, task in rows}):
        model, tensors = setup.plain_with_tensors(dtype)
        setup.write(tensors, _weights(setup, task))
        mine = [i for i, (_, other) in enumerate(rows) if other == task]
        with torch.no_grad():
            found = model(input_ids=setup.ids[[rows[i][0] for i in mine]]).last_hidden_state
        out = found.new_empty((len(rows), *found.shape[1:])) if out is None else out
        out[mine] = found
    return out


def _ours(setup: Setup, count: int) -> nn.Module:
    model = setup.stock()
    for task in range(count):
        setup.write(setup.method.adapt(model, _name(task), setup.case), _weights(setup, task))
    return model.to(setup.case.torch_dtype).eval().requires_grad_(False)


def _peft(setup: Setup, count: int) -> nn.Module:
    import peft

    model = setup.stock()
    wrapped = peft.get_peft_model(model, setup.method.peft_config(setup.case), adapter_name=_name(0))
    for task in range(count):
        if task:
            wrapped.add_adapter(_name(task), setup.method.peft_config(setup.case))
        setup.write(setup.method.peft_tensors(model, _name(task), setup.case), _weights(setup, task))
    return wrapped.to(setup.case.device, setup.case.torch_dtype).eval().requires_grad_(False)


def _mixed(setup: Setup, rows: Rows) -> dict[str, Callable[[], Tensor]]:
    names, ids = [_name(task) for _, task in rows], setup.ids
    count = len(set(names))
    one, several = _ours(setup, 1), _ours(setup, count)

    def forward(model: nn.Module, **more: Any) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, **more).last_hidden_state

    def routed() -> Tensor:
        with fa.route(several, names):
            return forward(several)

    found = {"fastadapt": lambda: forward(one), "fastadapt-mixed": routed}
    if setup.case.method == "lora" and PEERS["peft"].missing() is None:
        theirs, mixed = _peft(setup, 1), _peft(setup, count)
        found["peft"] = lambda: forward(theirs)
        found["peft-mixed"] = lambda: forward(mixed, adapter_names=names)
    return found


def _shared(setup: Setup, count: int) -> dict[str, Callable[[], Tensor]]:
    names, ids = tuple(map(_name, range(count))), setup.ids
    model = _ours(setup, count)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids).last_hidden_state

    def alone() -> Tensor:
        found = []
        for name in names:
            fa.activate(model, name)
            found.append(forward())
        return torch.stack(found, dim=1).flatten(0, 1)

    def together() -> Tensor:
        with fa.route(model, [names] * len(ids)):
            return forward()

    return {"fastadapt-alone": alone, "fastadapt-shared": together}


def run_case(case: Case, tasks: int, *, shared: bool = False, budget: float, progress: Progress) -> list[report.Record]:
    """All records of one cell; in a mixed one a batch of fewer rows than ``tasks`` has one task a row."""
    count = tasks if shared else min(tasks, case.batch)
    cell = f"{case.dtype} {case.method} B={case.batch}, {count} tasks"
    setup = Setup(case)
    progress.tick(f"{cell}: setting up")
    one = [(text, 0) for text in range(case.batch)]
    if shared:
        several = [(text, task) for text in range(case.batch) for task in range(count)]
        systems = _shared(setup, count)
    else:
        several = [(text, text % count) for text in range(case.batch)]
        systems = _mixed(setup, several)
    rows_of = {name: one if name in ("fastadapt", "peft") else several for name in systems}
    verdicts: dict[str, verify.Verdict] = {}
    for rows in (one, several):
        judged = {name: call for name, call in systems.items() if rows_of[name] is rows}
        if judged:
            exact = _plain(setup, rows, torch.float64)
            yardstick = verify.hidden_state_distance(_plain(setup, rows, case.torch_dtype), exact)
            for name, call in judged.items():
                factor = verify.OWN_FACTOR if name.startswith("fastadapt") else verify.PEER_FACTOR
                verdicts[name] = verify.judge(verify.hidden_state_distance(call(), exact), yardstick, factor)
                if not verdicts[name].correct:
                    progress.step(f"{cell}: {SYSTEMS[name][0]} is WRONG ({verdicts[name]}), so it is not timed")
    right = {name: call for name, call in systems.items() if verdicts[name].correct}
    progress.step(f"{cell}: {len(right)} systems take turns")
    samples = measure.take_turns(
        right,
        budget=budget,
        device=case.device,
        min_rounds=measure.MIN_ROUNDS,
        progress=lambda done, left: progress.tick(f"{cell}: round {done}, {max(left, 0):.0f} s left"),
    )
    return [
        report.record(
            "shared" if shared else "mixed",
            case,
            name,
            SYSTEMS[name][0],
            verdict=verdicts[name],
            samples=samples.get(name),
            base=samples.get(SYSTEMS[name][1]),
            peak_bytes=measure.peak_bytes(right[name], case.device) if name in right else None,
            base_system=SYSTEMS[name][1],
            tasks=len({task for _, task in rows_of[name]}),
            mixed_with=count,
        )
        for name in systems
    ]


def rows(records: Sequence[report.Record]) -> str:
    """The table."""
    cell = report.cells(records)

    def figures(r: report.Record) -> list[str]:
        ratio = "-" if r["ratio_to_bare"] is None else f"{r['ratio_to_bare']:.3f}"
        return [*report.times(r, 2), ratio, megabytes(r["peak_bytes"])]

    base = "÷ alone" if records and records[0]["bench"] == "shared" else "÷ one task"
    headers = ("system", "p20 ms", "p50 ms", "p80 ms", base, "peak MB")
    return report.cell_table(
        headers,
        records,
        cell=lambda r: f"{cell(r)} {r['mixed_with']} tasks",
        name=lambda r: r["label"],
        figures=figures,
    )
