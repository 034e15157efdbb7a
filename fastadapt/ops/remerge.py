"""The call of the op behind merge_, unmerge_ and swap_, outside compiled graphs: what it lists depends on the data."""

from __future__ import annotations

import math

import torch

from fastadapt import dispatch
from fastadapt.ops.merge import Residue, check_places


@torch.compiler.disable
def remerge(weights, old, new, residues):
    """Take ``old`` (a, b, scales, residues) out and put ``new`` (a, b, scales) in; either may be None."""
    old_a, old_b, old_scales, old_residues = old or ([], [], [], None)
    a, b, scales = new or ([], [], [])
    kept = old_residues or []
    prefix = "old_" if new else ""
    backend = dispatch.serving("remerge_", weights[0].device.type, weights[0].dtype)
    if backend != "cpu":
        check_places(f"{prefix}residues", kept, weights)
    kernel = dispatch.kernel(backend, "remerge_")
    with torch.no_grad():
        codes, index, bits, refused = kernel(
            weights, old_a, old_b, old_scales, [k.codes for k in kept], [k.index for k in kept],
            [k.bits for k in kept], a, b, scales, residues is not None,
        )  # fmt: skip
    culprit = int(refused)
    if culprit >= 0:
        if old is not None:
            _explain(culprit, weights, old_a, old_b, old_scales, prefix)
        if new is not None:
            _explain(culprit, weights, a, b, scales, "")
        raise ValueError(f"weights[{culprit}]: the result would overflow {weights[culprit].dtype}; nothing was changed")
    torch.autograd.graph.increment_version([w for w in weights if not w.is_inference()])
    if residues is not None:
        residues.extend(Residue(*parts) for parts in zip(codes, index, bits, strict=True))


def _explain(i: int, weights, a, b, scales, prefix: str) -> None:
    """Raise with the name of the argument that holds NaN or infinity, if one does."""
    if not math.isfinite(scales[i]):
        raise ValueError(f"{prefix}scales[{i}]: got {scales[i]}; a finite number is accepted; nothing was changed")
    for name, tensor in ((f"{prefix}a", a[i]), (f"{prefix}b", b[i]), ("weights", weights[i])):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}[{i}]: holds NaN or infinity; finite values are accepted; nothing was changed")
