"""What is settled before a forward of the base model, and what is collected after one.

Two hooks, put in by activating an adaptation that needs them: one before the base's forward, one after the model's.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import dispatch
from fastadapt.config import AdapterDrop
from fastadapt.modules.active import Part
from fastadapt.modules.state import container_of
from fastadapt.modules.unseen import Given


@dataclass(eq=False)
class Turn:
    """One forward, and what its backward has to know about it.

    Args:
        first: layers below it are dropped for the whole batch.
        live: bool [L, B] on the CPU, which rows each layer adapts; None where it is all of them.
        unpadded: bool [B, S]; None where nothing is padding.
        recorded: whether autograd was on when it began.
        losses: what parts add to the loss, by their ids; None where it has been taken.
        replayed: ids of parts that a reentrant checkpoint runs without autograd now, and once more in backward.
        weight: what the gradient of the loss with respect to each of ``losses`` is; backward finds out, before it comes
            to the replayed parts.
    """

    first: int = 0
    live: Tensor | None = None
    unpadded: Tensor | None = None
    recorded: bool = False
    losses: dict[int, Tensor | None] = field(default_factory=dict)
    replayed: set[int] = field(default_factory=set)
    weight: Tensor | None = None

    def bring(self, part: Part, carrier: Tensor, loss: Tensor) -> Tensor:
        """Have ``loss`` join the model's, and ``carrier`` back, which the part's output has to be computed from.

        A reentrant checkpoint runs the part without autograd first, so that the loss joins as a mere number, and again
        in backward, where its gradient comes along with the carrier's.
        """
        if id(part) in self.replayed and torch.is_grad_enabled():
            return _Replayed.apply(carrier, loss, self)
        if self.recorded and not torch.is_grad_enabled():
            self.replayed.add(id(part))
        self.losses.setdefault(id(part), loss)
        return carrier

    def take(self, part: Part) -> Tensor | None:
        loss = self.losses.get(id(part))
        if loss is not None:
            self.losses[id(part)] = None  # a checkpoint's second run finds it taken
        return loss


class _Replayed(torch.autograd.Function):
    """``carrier``; in backward the gradient of ``loss`` comes along, with the weight that :class:`_Weighed` left."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor, turn: Turn) -> Tensor:
        ctx.turn, ctx.like = turn, loss.detach()
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        weight = ctx.turn.weight
        return grad, None if weight is None else weight.to(ctx.like).expand_as(ctx.like), None


class _Weighed(torch.autograd.Function):
    """``loss``, the mean of ``count``; backward notes in the forward's turn what each of them weighs.

    It does so before it comes to the layers, which were run earlier. ``anchor`` requires a gradient and gets none: it
    makes autograd come by where the losses have no graph yet.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, step: Step, count: int) -> Tensor:
        ctx.step, ctx.turn, ctx.count = step, step.turn, count
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        ctx.turn.weight = grad / ctx.count
        ctx.step.turn = ctx.turn  # of several forwards before one backward, a checkpoint replays this one now
        return None, grad, None, None


class Step:
    """What the parts of one adaptation share about the running forward.

    Args:
        layers: L.
        drop: which layers go without adapters, or None.
    """

    def __init__(self, layers: int, drop: AdapterDrop | None) -> None:
        self.layers, self.drop = layers, drop
        self.turn = Turn()

    def begin(self, base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Draw what is dropped in this forward, and note the padding.

        The draws are PyTorch's CPU generator's, so that seeds repeat them.
        """
        given = Given.to(args, kwargs)
        turn = self.turn = Turn(recorded=torch.is_grad_enabled())
        turn.unpadded = given.mask.bool() if given.mask is not None and given.mask.dim() == 2 else None
        if self.drop is None or not base.training:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"AdapterDrop(mode={self.drop.mode!r}) draws on the host in every forward, which a CUDA graph does not "
                "repeat; accepted is an adaptation without it, or a forward outside of a capture"
            )
        if self.drop.mode == "robust":
            turn.first = _on_all_ranks(torch.randint(self.layers, ()), next(base.parameters()).device)
        elif self.drop.mode == "independent":
            turn.live = torch.rand(self.layers, given.tokens.shape[0]) >= self.drop.p

    def dropped(self, layer: int) -> bool:
        """Whether nothing of the adaptation runs in this layer (-1: the embeddings) for any row."""
        turn = self.turn
        if layer < turn.first and turn.first > 0:
            return True
        return turn.live is not None and layer >= 0 and not bool(turn.live[layer].any())

    def rows(self, layer: int) -> Tensor | None:
        """[B] on the CPU: the rows that this layer adapts; None where it is all of them."""
        live = self.turn.live
        if live is None or layer < 0 or bool(live[layer].all()):
            return None
        return live[layer]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "turn": Turn()}


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
        container = container_of(model)
        if isinstance(output, tuple):
            # Of a head's outputs the loss alone is a scalar, and it comes first.
            loss = output[0] if output and isinstance(output[0], Tensor) and output[0].dim() == 0 else None
        else:
            loss = getattr(output, "loss", None)
        if loss is None:
            if container.loss_waits:
                _warn_once(container.active)
            container.loss_waits = True
            return None
        extra = auxiliary_loss(model)
        if extra is None:
            return None
        if isinstance(output, tuple):
            return (loss + extra, *output[1:])
        output["loss"] = loss + extra
        return output


@functools.cache
def _warn_once(name: str) -> None:
    warnings.warn(
        f"the forward of {name!r} was given no labels, so its auxiliary loss joined nothing (label smoothing in "
        "Trainer and losses computed from logits do that); accepted is to add fa.auxiliary_loss(model) after it",
        stacklevel=2,
    )


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """What the active adaptation adds to the task's loss: AdapterFusion's regulariser, the loss of predicted masks.

    A model that is given labels returns a loss that has it, in training; this is for who computes the loss from the
    model's other outputs. To be called after the forward, once.

    Args:
        model: any; what is not adapted adds nothing.

    Returns:
        A scalar that a gradient flows through, or None where there is nothing to add.
    """
    container = container_of(model)
    if container is None or container.active is None:
        return None
    container.loss_waits = False
    total: Tensor | None = None
    averaged: list[Tensor] = []
    step: Step | None = None
    for name in (container.active, *container.summed):
        for part in container[name].parts().values():
            loss = part.take_loss()
            if loss is None:
                continue
            if part.averaged:
                averaged.append(loss)
                step = part.step
            else:
                total = loss if total is None else total + loss
    if averaged:
        mean = sum(averaged[1:], averaged[0]) / len(averaged)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not dispatch.transformed():
            mean = _Weighed.apply(torch.zeros((), requires_grad=True), mean, step, len(averaged))
        total = mean if total is None else total + mean
    return total


def set_hooks(model: nn.Module, base: nn.Module, running: Iterable[Part]) -> None:
    """Let model and base do around a forward what the running parts need, and nothing else of this kind."""
    _unhook(base._forward_pre_hooks, base._forward_pre_hooks_with_kwargs, _Begin)
    _unhook(model._forward_hooks, {}, _AddLosses)
    parts = list(running)
    step = next((part.step for part in parts if part.step is not None), None)
    if step is not None:
        step.turn = Turn()
        base.register_forward_pre_hook(_Begin(step), with_kwargs=True)
    if any(part.has_loss for part in parts):
        model.register_forward_hook(_AddLosses())


def _unhook(hooks: dict[int, Any], also: dict[int, Any], kind: type) -> None:
    for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
        del hooks[key]
        also.pop(key, None)
