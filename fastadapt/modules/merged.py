"""What is merged into the weights of some linear layers, and the way back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.modules.lora import LoRA
from fastadapt.ops import Residue, merge_, swap_, unmerge_


class Merged:
    """One merge. It keeps A, B and scale as they were, so that what happens to them later does not matter.

    It refers to the layers, not to their weights: a copy or a pickle of a model has its own, in step with its layers.

    Args:
        layers: path of each layer, for messages -> (the layer, what is merged into it, summed).
        exact: keep what makes the way back exact.
        before: a merge of now, which this one takes the place of, in one pass where both are in the same layers.

    Raises:
        TypeError, ValueError: naming the layer and what was wrong with it; every weight is then as it was.
    """

    def __init__(
        self, layers: dict[str, tuple[nn.Linear, Sequence[LoRA]]], *, exact: bool, before: Merged | None = None
    ) -> None:
        self.paths = list(layers)
        self.modules = [module for module, _ in layers.values()]
        factors = [_stacked(parts) for _, parts in layers.values()]
        self.a, self.b = [f[0] for f in factors], [f[1] for f in factors]
        self.scales = [f[2] for f in factors]
        self.residues: list[Residue] | None = [] if exact else None
        self.copies: dict[int, Tensor] = {}  # of layers with a magnitude, whose change is no sum: W as it was
        magnitudes = {i: parts[0] for i, (_, parts) in enumerate(layers.values()) if _is_dora(parts)}
        if before is not None:
            before.check()
        if before is not None and not magnitudes and not before.copies and before.modules == self.modules:
            with _named(self.paths):
                swap_(self.weights(), before.a, before.b, before.scales, before.residues, self.a, self.b, self.scales,
                      self.residues)  # fmt: skip
        elif before is not None or magnitudes:
            self._in_steps(magnitudes, before)
        else:
            with _named(self.paths):
                merge_(self.weights(), self.a, self.b, self.scales, self.residues)
        self.seen: list[tuple[int, int]] | None = self._versions()
        self.frozen: list[nn.Parameter] = []  # what trains again once this is taken out
        self.above: list[nn.Module] = []  # whose conversions unmerge first
        self.live = True  # until it is taken out

    def _in_steps(self, magnitudes: dict[int, LoRA], before: Merged | None) -> None:
        # More than one write, of which a later one may be refused: so all touched weights are copied first.
        touched = [*self.modules, *([] if before is None else before.modules)]
        backup = [(m.weight, m.weight.detach().clone()) for m in dict.fromkeys(touched)]
        try:
            if before is not None:
                before.take_out()
            sums = [i for i in range(len(self.modules)) if i not in magnitudes]
            residues: list[Residue] | None = None if self.residues is None else []
            with _named([self.paths[i] for i in sums]):
                merge_(
                    *([values[i] for i in sums] for values in (self.weights(), self.a, self.b, self.scales)), residues
                )
            if residues is not None:
                self.residues = residues
            for i, part in magnitudes.items():
                self._scale(i, part)
        except BaseException:
            for weight, was in backup:
                _write(weight, was)
            if before is not None:
                before.seen = before._versions()
            raise

    def _scale(self, i: int, part: LoRA) -> None:
        """W ← m·(W + s·BA)/‖W + s·BA‖, rounded once."""
        weight = self.modules[i].weight.detach()
        wide = torch.addmm(weight.float(), self.b[i].float(), self.a[i].float(), alpha=self.scales[i])
        ratio = part.lora_magnitude_vector.detach().float() / torch.linalg.vector_norm(wide, dim=1)
        result = (wide * ratio.unsqueeze(1)).to(weight.dtype)
        if not torch.isfinite(result).all():
            raise ValueError(f"{self.paths[i]}: merging gives NaN or infinity; nothing was changed")
        self.copies[i] = weight.clone()
        _write(weight, result)

    def weights(self) -> list[Tensor]:
        return [m.weight for m in self.modules]

    def check(self) -> None:
        """Raise where a weight was written since the merge: the way back would not lead to what it was."""
        changed = [] if self.seen is None else zip(self.paths, self.seen, self._versions(), strict=True)
        for path, then, now in changed:
            if then != now:
                raise ValueError(
                    f"{path}: its weight was written or replaced while an adaptation was merged into it, so unmerging "
                    "it would not give back what it was; load or train weights only after unmerge"
                )

    def take_out(self) -> None:
        """Give the weights back what they were: to the bit, if the merge was exact; all of them or none."""
        self.check()
        sums = [i for i in range(len(self.modules)) if i not in self.copies]
        with _named([self.paths[i] for i in sums]):
            unmerge_(*([values[i] for i in sums] for values in (self.weights(), self.a, self.b, self.scales)),
                     self.residues)  # fmt: skip
        for i, was in self.copies.items():
            _write(self.modules[i].weight, was)
        self.seen = None

    def rest(self, above: Mapping[nn.Module, Sequence[nn.Linear]]) -> None:
        """Let the layers know, so that they run nothing beside their weights, and unmerge before they are moved.

        Args:
            above: every module that has such layers below it, with these. It converts what lies before them first, so
                that it has to unmerge them itself: a refusal by a layer would come too late.
        """
        for module in self.modules:
            active, child = module.active, module.child
            active.merged[child] = active.loras.pop(child)
            module.__dict__["merge"] = self
        for module, layers in above.items():
            if "_apply" not in module.__dict__:
                module.__dict__["_apply"] = _UnmergeFirst(module, self, layers)
                self.above.append(module)

    def wake(self) -> None:
        """Undo :meth:`rest`, and let train again what did."""
        for module in self.modules:
            active, child = module.active, module.child
            active.loras[child] = active.merged.pop(child)
            del module.__dict__["merge"]
        for module in self.above:
            module.__dict__.pop("_apply", None)
        self.above = []
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.live = False
        self.a, self.b, self.residues, self.copies = [], [], None, {}  # the model holds on to the record alone

    def before_conversion(self, layers: Sequence[nn.Linear], fn: Callable[[Tensor], Tensor]) -> None:
        """Undo it where ``fn`` changes one of these layers: what is kept for the way back is of their dtype and device.

        Raises:
            ValueError: where a weight was written since the merge.
        """
        if any(changes(module.weight, fn) for module in layers):
            self.undo()

    def undo(self) -> None:
        """Take it out of the weights, and let run beside them what was merged."""
        self.take_out()
        self.wake()

    def _versions(self) -> list[tuple[int, int]]:
        return [(id(m.weight), m.weight._version) for m in self.modules]

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weights are other tensors, with counters of their own.
        return {**self.__dict__, "seen": None}


class _UnmergeFirst:
    """Stands in place of the ``_apply`` of a module, an attribute of the instance that copies and pickles with it."""

    def __init__(self, module: nn.Module, merge: Merged, layers: Sequence[nn.Linear]) -> None:
        self.module, self.merge, self.layers = module, merge, layers

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.merge.before_conversion(self.layers, fn)
        return type(self.module)._apply(self.module, fn, recurse)


def _is_dora(parts: Sequence[LoRA]) -> bool:
    return parts[0].lora_magnitude_vector is not None


def _stacked(parts: Sequence[LoRA]) -> tuple[Tensor, Tensor, float]:
    """Copies of A, B and the scale of one LoRA; of several those of one LoRA of the sum of their ranks."""
    if len(parts) == 1:
        part = parts[0]
        return part.lora_A.weight.detach().clone(), part.lora_B.weight.detach().clone(), part.scale
    a = torch.cat([part.lora_A.weight.detach() for part in parts])
    b = torch.cat([part.lora_B.weight.detach().float() * part.scale for part in parts], dim=1)
    return a, b, 1.0


@torch.no_grad()
def _write(weight: Tensor, value: Tensor) -> None:
    weight.detach().copy_(value)


@contextmanager
def _named(paths: list[str]) -> Iterator[None]:
    """Let errors of the op name layers by their paths instead of by their places in a list."""
    names = {"a": "lora_A", "b": "lora_B", "weights": "weight", "scales": "scale"}

    def named(found: re.Match[str]) -> str:
        return f"{names[found[2]]} {'merged now ' if found[1] else ''}of {paths[int(found[3])]}"

    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(re.sub(r"\b(old_)?(a|b|weights|scales)\[(\d+)\]", named, str(error))) from error


def changes(weight: Tensor, fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``fn``, as ``nn.Module._apply`` gets it, changes dtype or device of such a weight."""
    probe = fn(weight.detach().new_empty(0))
    return (probe.dtype, probe.device) != (weight.dtype, weight.device)
