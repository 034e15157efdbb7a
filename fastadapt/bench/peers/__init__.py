"""Who is measured: one file a peer, each with one setup function a job.

A setup function takes a :class:`~fastadapt.bench.setup.Setup` and gives back what is timed. All peers of a case get the
same base weights, the same adapter weights and the same tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastadapt.bench.case import UserError

if TYPE_CHECKING:
    from fastadapt.bench.setup import Setup


@dataclass(frozen=True)
class Inference:
    """A forward pass: ``call`` is timed, ``hidden`` turns what it returns into the last hidden state [B, S, H]."""

    call: Callable[[], Any]
    hidden: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Training:
    """One optimizer step: ``step`` is timed; ``loss`` is its forward, ``gradients`` what a backward left, by name."""

    model: nn.Module
    step: Callable[[], Any]
    loss: Callable[[], Tensor]
    gradients: Callable[[], dict[str, Tensor]]


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
    """

    name: str
    label: str
    module: str
    adapted: bool
    needs: tuple[tuple[str, str], ...] = ()
    inference: str | None = None
    training: str | None = None

    def missing(self) -> str | None:
        """What to install before it can run; None where it can."""
        absent = [install for package, install in self.needs if importlib.util.find_spec(package) is None]
        return f"{self.name} needs {', '.join(absent)}: pip install {' '.join(absent)}" if absent else None

    def setup(self, job: str, case: Setup) -> Any:
        """What to time for ``job``, ``"inference"`` or ``"training"``.

        Raises:
            UserError: where this peer cannot serve the case, with the reason.
        """
        function = getattr(self, job)
        if function is None:
            raise UserError(f"{self.name} has no {job} benchmark")
        module = importlib.import_module(f"fastadapt.bench.peers.{self.module}")
        return getattr(module, function)(case)


_ADAPTERS = (("adapters", "adapters==1.3.0"),)
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("stock", "stock, no adapters", "stock", False, (), "inference"),
        Peer("full", "stock, all weights train", "stock", False, (), None, "training"),
        Peer("bare", "fastadapt, no adapters", "fused", False, (), "bare"),
        Peer("fastadapt", "fastadapt", "fused", True, (), "adapted", "training"),
        Peer("adapterhub", "AdapterHub", "adapterhub", True, _ADAPTERS, "inference", "training"),
        Peer("compile", "torch.compile, no adapters", "compiled", False, (), "stock"),
        Peer("adapterhub-compile", "AdapterHub, torch.compile", "compiled", True, _ADAPTERS, "adapterhub"),
        Peer("openvino", "OpenVINO", "exchange", True, (("openvino", "openvino"),), "openvino"),
        Peer(
            "onnxruntime",
            "ONNX Runtime",
            "exchange",
            True,
            (("onnxruntime", "onnxruntime"), ("onnx", "onnx"), ("onnxscript", "onnxscript")),
            "onnxruntime",
        ),
    )
}


def chosen(job: str, requested: list[str] | None, default: tuple[str, ...]) -> tuple[list[Peer], list[str]]:
    """(the peers to measure, a note for each default one that is not installed).

    Args:
        job: ``"inference"`` or ``"training"``.
        requested: names from ``--peers``; None takes ``default`` as far as it is installed.
        default: names.

    Raises:
        UserError: for an unknown name, one without this job, and a requested one that is not installed.
    """
    able = [name for name, peer in PEERS.items() if getattr(peer, job)]
    peers, notes = [], []
    for name in default if requested is None else requested:
        if name not in able:
            raise UserError(f"--peers: got {name!r}; accepted are {', '.join(able)}")
        missing = PEERS[name].missing()
        if missing is None:
            peers.append(PEERS[name])
        elif requested is None:
            notes.append(f"left out: {missing}")
        else:
            raise UserError(f"--peers: {missing}")
    return peers, notes
