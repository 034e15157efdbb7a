"""What is settled before a forward of the base model, and what is collected after one.

Two hooks, put in by activating an adaptation that needs them: one before the base's forward, one after the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.config import AdapterDrop
from fastadapt.modules.active import Part
from fastadapt.modules.state import container_of


class Step:
    """What the parts of one adaptation share about the running forward.

    Args:
        layers: L.
        drop: which layers go without adapters, or None.
    """

    def __init__(self, layers: int, drop: AdapterDrop | None) -> None:
        self.layers, self.drop = layers, drop
        self.first = 0  # layers below it are dropped for the whole batch
        self.live: Tensor | None = None  # [L, B] on the CPU: which rows each layer adapts
        self.unpadded: Tensor | None = None  # [B, S], or None where nothing is padding

    def begin(self, base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Draw what is dropped in this forward, and note the padding.

        The draws are PyTorch's CPU generator's, so that seeds repeat them.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self.unpadded = mask.bool() if mask is not None and mask.dim() == 2 else None
        self.first, self.live = 0, None
        if self.drop is None or not base.training:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"AdapterDrop(mode={self.drop.mode!r}) draws on the host in every forward, which a CUDA graph does not "
                "repeat; accepted is an adaptation without it, or a forward outside of a capture"
            )
        if self.drop.mode == "robust":
            self.first = _on_all_ranks(torch.randint(self.layers, ()), next(base.parameters()).device)
        elif self.drop.mode == "independent":
            self.live = torch.rand(self.layers, ids.shape[0]) >= self.drop.p

    def dropped(self, layer: int) -> bool:
        """Whether nothing of the adaptation runs in this layer (-1: the embeddings) for any row."""
        if layer < self.first and self.first > 0:
            return True
        return self.live is not None and layer >= 0 and not bool(self.live[layer].any())

    def rows(self, layer: int) -> Tensor | None:
        """[B] on the CPU: the rows that this layer adapts; None where it is all of them."""
        if self.live is None or layer < 0 or bool(self.live[layer].all()):
            return None
        return self.live[layer]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "first": 0, "live": None, "unpadded": None}


def _on_all_ranks(value: Tensor, device: torch.device) -> int:
    """What rank 0 drew; each rank draws too, so that their generators stay in step."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        if distributed.get_backend() == "nccl":
            value = value.to(device)
        distributed.broadcast(value, 0)
    return int(value)


class _Begin:
    """Before the base's forward."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step.begin(base, args, kwargs)


class _AddLosses:
    """After the model's forward, in training: what its parts add to the loss."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not model.training or not torch.is_grad_enabled():
            return None
        if isinstance(output, tuple):
            # Of a head's outputs the loss alone is a scalar, and it comes first.
            if not output or not isinstance(output[0], Tensor) or output[0].dim() != 0:
                return None
            extra = auxiliary_loss(model)
            return None if extra is None else (output[0] + extra, *output[1:])
        if getattr(output, "loss", None) is not None:
            extra = auxiliary_loss(model)
            if extra is not None:
                output["loss"] = output["loss"] + extra
        return output


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """What the active adaptation adds to the task's loss: AdapterFusion's regulariser, the loss of predicted masks.

    A model that is given labels returns a loss that has it, in training; this is for who computes the loss from the
    model's other outputs. To be called after the forward, once.

    Returns:
        A scalar that a gradient flows through, or None where there is nothing to add.
    """
    container = container_of(model)
    if container is None or container.active is None:
        return None
    running = [p for name in (container.active, *container.summed) for p in container[name].parts().values()]
    summed = [loss for part in running if not part.averaged and (loss := part.take_loss()) is not None]
    averaged = [loss for part in running if part.averaged and (loss := part.take_loss()) is not None]
    total = sum(summed[1:], summed[0]) if summed else None
    if averaged:
        mean = sum(averaged[1:], averaged[0]) / len(averaged)
        total = mean if total is None else total + mean
    return total


def set_hooks(model: nn.Module, base: nn.Module, running: Iterable[Part]) -> None:
    """Let model and base do around a forward what the running parts need, and nothing else of this kind."""
    _unhook(base._forward_pre_hooks, base._forward_pre_hooks_with_kwargs, _Begin)
    _unhook(model._forward_hooks, {}, _AddLosses)
    parts = list(running)
    step = next((part.step for part in parts if part.step is not None), None)
    if step is not None:
        step.first, step.live = 0, None
        base.register_forward_pre_hook(_Begin(step), with_kwargs=True)
    if any(part.has_loss for part in parts):
        model.register_forward_hook(_AddLosses())


def _unhook(hooks: dict[int, Any], also: dict[int, Any], kind: type) -> None:
    for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
        del hooks[key]
        also.pop(key, None)
