"""Who is measured: one file a peer, each with one setup function a job.

A setup function takes a :class:`~fastadapt.bench.setup.Setup` and gives back what is timed. All peers of a case get the
same base weights, the same adapter weights and the same tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastadapt.bench import verify
from fastadapt.errors import UserError

if TYPE_CHECKING:
    from fastadapt.bench.setup import Setup


@dataclass(frozen=True)
class Inference:
    """A forward pass: ``call`` is timed, ``hidden`` turns what it returns into the last hidden state [B, S, H]."""

    call: Callable[[], Any]
    hidden: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Training:
    """One optimizer step: ``steps`` are timed, in their order; ``loss`` is the forward of one.

    ``tensors`` are the method's parameters by name.
    """

    model: nn.Module
    steps: dict[str, Callable[[], Any]]
    loss: Callable[[], Tensor]
    tensors: dict[str, Tensor]

    def step(self) -> None:
        """All of them."""
        for each in self.steps.values():
            each()

    def gradients(self) -> dict[str, Tensor]:
        """What a backward left in ``tensors``, where it left anything."""
        return {name: tensor.grad for name, tensor in self.tensors.items() if tensor.grad is not None}


@dataclass(frozen=True)
class Merging:
    """Two LoRAs and the weights that they merge into; ``swap`` goes from the first one merged to the second."""

    matrices: dict[str, Tensor]
    merge: Callable[[], Any]
    swap: Callable[[], Any]
    unmerge: Callable[[], Any]


def _installed(package: str) -> bool:
    # Asked of a package that is imported already, find_spec raises where that has set its own module object up.
    return package in sys.modules or importlib.util.find_spec(package) is not None


@dataclass(frozen=True)
class Peer:
    """A system of the benchmarks.

    Attributes:
        name: what ``--peers`` and the JSON call it.
        label: what tables and plots call it.
        module: ``fastadapt.bench.peers.<module>`` holds its setup functions.
        adapted: whether its model has adapters, and so which reference it has to match.
        needs: packages by import name and what to install for them.
        inference, training: the names of its setup functions; None where it has no such job.
        merging: likewise, of merging itself.
        ours: whether fastadapt computes it.
        merged: the system that measures the merged form of the same; it joins where the method merges.
    """

    name: str
    label: str
    module: str
    adapted: bool
    needs: tuple[tuple[str, str], ...] = ()
    inference: str | None = None
    training: str | None = None
    ours: bool = False
    merged: str | None = None
    merging: str | None = None

    @property
    def factor(self) -> float:
        """How many times the yardstick's distance from the reference it may be off."""
        return verify.OWN_FACTOR if self.ours else verify.PEER_FACTOR

    def missing(self) -> str | None:
        """What to install before it can run; None where it can."""
        absent = [install for package, install in self.needs if not _installed(package)]
        return f"{self.name} needs {', '.join(absent)}: pip install {' '.join(absent)}" if absent else None

    def setup(self, job: str, case: Setup) -> Any:
        """What to time for ``job``: ``"inference"``, ``"training"`` or ``"merging"``.

        Raises:
            UserError: where this peer cannot serve the case, with the reason.
        """
        function = getattr(self, job)
        if function is None:
            raise UserError(f"{self.name} has no {job} benchmark")
        module = importlib.import_module(f"fastadapt.bench.peers.{self.module}")
        return getattr(module, function)(case)


_ADAPTERS = (("adapters", "adapters==1.3.0"),)
_PEFT = (("peft", "peft"),)
_ONNX = (("onnxruntime", "onnxruntime"), ("onnx", "onnx"), ("onnxscript", "onnxscript"))
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("stock", "stock, no adapters", "stock", False, (), "inference"),
        Peer("full", "stock, all weights train", "stock", False, (), None, "training"),
        Peer("plain", "plain PyTorch", "stock", True, (), "plain", "plain_training"),
        Peer("bare", "fastadapt, no adapters", "fused", False, (), "bare", ours=True),
        Peer("fastadapt", "fastadapt", "fused", True, (), "adapted", "training", True, "fastadapt-merged", "merging"),
        Peer("fastadapt-merged", "fastadapt, merged", "fused", True, (), "merged", ours=True),
        Peer("fastadapt-swapped", "fastadapt, swapped in", "fused", True, (), "swapped", ours=True),
        Peer("undropped", "fastadapt, no layer dropped", "fused", False, (), None, "undropped", ours=True),
        Peer("all-positions", "fastadapt, all positions", "fused", True, (), None, "all_positions", ours=True),
        Peer("adapterhub", "AdapterHub", "adapterhub", True, _ADAPTERS, "inference", "training"),
        Peer("peft", "PEFT", "peft", True, _PEFT, "inference", "training", False, "peft-merged", "merging"),
        Peer("peft-merged", "PEFT, merged", "peft", True, _PEFT, "merged"),
        Peer("peft-accelerated", "PEFT, accelerated", "peft", True, _PEFT, "accelerated", "accelerated_training", True),
        Peer("compile", "torch.compile, no adapters", "compiled", False, (), "stock"),
        Peer("adapterhub-compile", "AdapterHub, torch.compile", "compiled", True, _ADAPTERS, "adapterhub"),
        Peer("peft-compile", "PEFT, torch.compile", "compiled", True, _PEFT, "peft"),
        Peer("openvino", "OpenVINO", "exchange", True, (("openvino", "openvino"),), "openvino"),
        Peer("onnxruntime", "ONNX Runtime", "exchange", True, _ONNX, "onnxruntime"),
    )
}


def expanded(names: Iterable[str], *, merges: bool) -> list[Peer]:
    """The peers of these names, each once, with their merged forms behind them where the method merges."""
    found: dict[str, Peer] = {}
    for name in names:
        for each in (name, PEERS[name].merged if merges else None):
            if each is not None:
                found.setdefault(each, PEERS[each])
    return list(found.values())


def chosen(job: str, requested: list[str] | None, default: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(the names of the peers to measure, a note for each default one that is not installed).

    Args:
        job: ``"inference"``, ``"training"`` or ``"merging"``.
        requested: names from ``--peers``; None takes ``default`` as far as it is installed.
        default: names.

    Raises:
        UserError: for an unknown name, one without this job, and a requested one that is not installed.
    """
    able = [name for name, peer in PEERS.items() if getattr(peer, job)]
    names, notes = [], []
    for name in default if requested is None else requested:
        if name not in able:
            raise UserError(f"--peers: got {name!r}; accepted are {', '.join(able)}")
        missing = PEERS[name].missing()
        if missing is None:
            names.append(name)
        elif requested is None:
            notes.append(f"left out: {missing}")
        else:
            raise UserError(f"--peers: {missing}")
    return names, notes
