"""What runs where, and how many parameters there are: two verbs that report and change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from fastadapt import dispatch
from fastadapt.adapt import base_parameters
from fastadapt.models import wiring_of
from fastadapt.modules.bottleneck import Site
from fastadapt.modules.state import Adaptation, container_of
from fastadapt.modules.sublayers import FusedSublayer
from fastadapt.modules.unpad import FusedEncoder


@dataclass(frozen=True)
class Served:
    """One op of one sublayer.

    Args:
        path: of the sublayer in the base model.
        op: a name of ``fastadapt.ops``, or "original" where the sublayer's own forward runs.
        backend: which serves it; "torch" for the original.
        refused: faster backend -> why it was refused; or {"fused": why the original forward runs}; or, of the encoder,
            {"without padding": why the layers see padding, "first position alone": why the last layer computes all
            positions}. It then says nothing of what a call decides: without a mask [B, S], with few tokens or little
            padding, padding stays; where hidden states are asked for, all positions run.
    """

    path: str
    op: str
    backend: str
    refused: dict[str, str]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; printed as a table with one row for like layers."""

    device: str
    dtype: str
    active: str | None
    rows: tuple[Served, ...]

    def __str__(self) -> str:
        head = f"device {self.device}, {self.dtype}, active adaptation: {self.active or 'none'}"
        groups = groupby(_by_kind(self.rows), key=lambda item: item[1:])
        table = [("sublayer", "op", "backend", "refused")]
        for (_, op, backend, refused), members in groups:
            table.append((_merged([path for path, *_ in members]), op, backend, refused or "-"))
        return head + "\n" + _aligned(table)


def explain(model: nn.Module, length: int = 128) -> Explanation:
    """For every sublayer which backend serves it, and why a faster one, or the fused form itself, was refused.

    Args:
        model: a model of a wired architecture; its dtype (or autocast's), device and state are what is explained.
        length: of the sequences, which decides about attention kernels.

    Returns:
        ``rows`` of ``path``, ``op``, ``backend`` and ``refused``, beside ``device``, ``dtype`` and ``active``; printed
        as a table.

    Raises:
        TypeError, ValueError: for a model of no wired architecture.
    """
    wiring = wiring_of(model)
    base = wiring.base_of(model)
    weight = next(iter(base.parameters()))
    device, dtype = weight.device.type, weight.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    container = container_of(model)
    rows: list[Served] = []
    for path, module in wiring.sublayers(base):
        if not isinstance(module, FusedSublayer):
            reason = "not accelerated" if type(module) in wiring.fused else f"{type(module).__name__} is not wired"
            rows.append(Served(path, "original", "torch", {"fused": reason}))
            continue
        if isinstance(module, FusedEncoder):
            stays = {"without padding": module.padding_stays(), "first position alone": module.all_positions_run()}
            rows.append(Served(path, "layers", "torch", {what: why for what, why in stays.items() if why is not None}))
            continue
        refusal = module.refusal()
        if refusal is not None:
            rows.append(Served(path, "original", "torch", {"fused": refusal}))
        for op, facts in module.ops(length):
            if op == "torch":
                rows.append(Served(path, facts["function"], "torch", {}))
                continue
            backend, refused = dispatch.choice(f"{op}_forward", device, dtype, **facts)
            rows.append(Served(path, op, backend, refused))
    active = None
    if container is not None and container.route is not None:
        active = f"{', '.join(map(repr, container.route.names))} by row"
    elif container is not None and container.active is not None:
        active = " + ".join((container.active, *container.summed)) + (" (merged)" if container.merged else "")
    return Explanation(device, str(dtype).removeprefix("torch."), active, tuple(rows))


@dataclass(frozen=True)
class TaskCount:
    """Parameters of one adaptation.

    Args:
        adapter, layer_norm, head: of its adapters, its copies of pretrained LayerNorms, and its head.
        share: of adapter and layer_norm together in the base's parameters.
        training_only: of what has no use at inference (the heads that predict masks).
    """

    adapter: int
    layer_norm: int
    head: int
    share: float
    training_only: int = 0

    @property
    def total(self) -> int:
        return self.adapter + self.layer_norm + self.head + self.training_only


@dataclass(frozen=True)
class ParameterReport:
    """What :func:`parameter_report` counted.

    Args:
        trained: parameters that require a gradient now.
        total: all parameters, of the base and of all adaptations.
        base: parameters of the base with its own head.
        tasks: adaptation -> its counts.
    """

    trained: int
    total: int
    base: int
    tasks: dict[str, TaskCount]

    @property
    def trained_share(self) -> float:
        return self.trained / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = [
            f"trained {self.trained:,} of {self.total:,} parameters ({self.trained_share:.2%}), base {self.base:,}",
        ]
        if self.tasks:
            table = [("task", "adapter", "LayerNorm", "head", "in training only", "share of the base")]
            for name, t in self.tasks.items():
                counts = (t.adapter, t.layer_norm, t.head, t.training_only)
                table.append((name, *(f"{count:,}" for count in counts), f"{t.share:.2%}"))
            lines.append(_aligned(table))
        return "\n".join(lines)


def parameter_report(model: nn.Module) -> ParameterReport:
    """Trained, total and per-task counts of parameters; heads and copies of LayerNorms are counted apart.

    Args:
        model: adapted, or any other, which has no tasks.

    Returns:
        ``trained``, ``total``, ``base``, ``trained_share`` and ``tasks``, by name; printed as a table.

    Raises:
        TypeError: for what is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted is an nn.Module")
    base = sum(p.numel() for _, p in base_parameters(model))
    tasks = {}
    container = container_of(model)
    for name in container if container is not None else ():
        adapter = layer_norm = head = training_only = 0
        norms = _copied_norms(container[name])
        apart = {id(p) for part in container[name].parts().values() for p in part.training_only()}
        for key, p in container[name].named_parameters():
            if key.startswith("head."):
                head += p.numel()
            elif id(p) in apart:
                training_only += p.numel()
            elif id(p) in norms:
                layer_norm += p.numel()
            else:
                adapter += p.numel()
        tasks[name] = TaskCount(adapter, layer_norm, head, (adapter + layer_norm) / max(base, 1), training_only)
    parameters = list(model.parameters())
    return ParameterReport(
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        base=base,
        tasks=tasks,
    )


def _copied_norms(adaptation: Adaptation) -> set[int]:
    """Ids of the parameters of an adaptation's copies of pretrained LayerNorms."""
    sites = [part for part in adaptation.parts().values() if isinstance(part, Site) and part.LayerNorm is not None]
    return {id(p) for site in sites for p in site.LayerNorm.parameters()}


# -- tables ------------------------------------------------------------------------------------------------------


def _by_kind(rows: tuple[Served, ...]) -> list[tuple[str, str, str, str, str]]:
    """(path, path without its layer, op, backend, refusals), like ones together, in the order of the first layer."""
    order: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        general = ".".join("*" if part.isdigit() else part for part in row.path.split("."))
        refused = "; ".join(f"{name}: {why}" for name, why in row.refused.items())
        order.setdefault((general, row.op, row.backend, refused), []).append(row.path)
    return [(path, *kind) for kind, paths in order.items() for path in paths]


def _merged(paths: list[str]) -> str:
    """a.0.b, a.1.b, a.2.b as a.0-2.b."""
    numbers = [int(part) for path in paths for part in path.split(".") if part.isdigit()]
    if not numbers:
        return paths[0]
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda item: item[1] - item[0])]
    text = ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return ".".join(text if part.isdigit() else part for part in paths[0].split("."))


def _aligned(table: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)
