"""Bottleneck adapters and their presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastadapt.config.checks import choice, different, finite, is_number, layer_numbers, positive, several
from fastadapt.config.drop import AdapterDrop
from fastadapt.ops.activations import canonical

PLACEMENTS: tuple[str, ...] = ("attention_output", "output")
INITS: tuple[str, ...] = ("houlsby", "bert", "mam_adapter", "lora")
LAYER_NORMS: tuple[str, ...] = ("none", "encoder", "all")
SCALES: tuple[str, ...] = ("learned", "channel")


@dataclass(frozen=True)
class BottleneckConfig:
    """A bottleneck adapter: A₁(u) = W_up σ(W_down u + b_down) + b_up, beside or after a sublayer.

    Args:
        bottleneck: width b of the adapter. Instead of it ``reduction_factor`` may be given; never both.
        reduction_factor: b = hidden size // reduction_factor, at least 1; a number, or a mapping from the layer
            (``"0"``, ``"1"``, ...) or ``"default"`` to one.
        activation: σ, a name of ``fastadapt.ops.ACTIVATIONS`` or an alias of one.
        placements: after which sublayers: ``"attention_output"``, ``"output"`` (of the feed-forward network).
        parallel: the adapter reads the sublayer's input instead of its output (He et al. 2022).
        scale: a number, ``"learned"`` (one scalar) or ``"channel"`` (one a hidden unit); both start at 1.
        dropout: on the adapter's output, in training.
        init: ``"houlsby"`` (normal, std 1e-3, truncated at two of them, zero biases), ``"bert"`` (normal, std 0.02),
            ``"mam_adapter"`` or ``"lora"`` (W_down Kaiming, W_up zero).
        leave_out: layers, counted from 0, without an adapter.
        gate: multiply the adapter's output by the sigmoid of a learned projection of what it reads, averaged over the
            sequence (padding too, as AdapterHub does).
        ln_before, ln_after: a new LayerNorm before W_down, or after the adapter's output.
        train_layer_norm: own trainable copies of the pretrained LayerNorms: ``"none"``, ``"encoder"``, or ``"all"``
            (the embeddings' too).
        original_ln_before: the adapter reads LN(f + x), f the sublayer's output and x its input.
        original_ln_after: residual and pretrained LayerNorm follow the adapter.
        residual_before_ln: under ``original_ln_before``, the adapter's own skip is f (True), f + x (``"post_add"``) or
            LN(f + x) (False).
        adapter_residual_before_ln: under ``ln_after``, whether the adapter's own skip goes under the new LayerNorm.

        drop: layers in which the adapter does not run (:class:`AdapterDrop`).

    Raises:
        ValueError, TypeError: naming the field, what was given and what is accepted.
    """

    bottleneck: int | None = None
    reduction_factor: float | Mapping[str, float] | None = None
    activation: str = "relu"
    placements: tuple[str, ...] = PLACEMENTS
    parallel: bool = False
    scale: float | Literal["learned", "channel"] = 1.0
    dropout: float = 0.0
    init: Literal["houlsby", "bert", "mam_adapter", "lora"] = "houlsby"
    leave_out: tuple[int, ...] = ()
    gate: bool = False
    ln_before: bool = False
    ln_after: bool = False
    train_layer_norm: Literal["none", "encoder", "all"] = "none"
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | Literal["post_add"] = True
    adapter_residual_before_ln: bool = False
    drop: AdapterDrop | None = None

    def __post_init__(self) -> None:
        self._check_width()
        canonical(self.activation)
        self._check_placements()
        if isinstance(self.scale, str):
            choice("scale", self.scale, SCALES)
        else:
            finite("scale", self.scale, accepted="a finite number, 'learned' and 'channel'")
        if not is_number(self.dropout) or not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout: got {self.dropout!r}; accepted is a probability from 0 to 1")
        choice("init", self.init, INITS)
        object.__setattr__(self, "leave_out", layer_numbers("leave_out", self.leave_out))
        for field in ("parallel", "gate", "ln_before", "ln_after", "original_ln_before", "original_ln_after",
                      "adapter_residual_before_ln"):  # fmt: skip
            choice(field, getattr(self, field), (True, False))
        choice("residual_before_ln", self.residual_before_ln, (True, False, "post_add"))
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            raise ValueError("residual_before_ln: 'post_add' is accepted only with original_ln_before=True")
        if self.parallel and self.original_ln_before:
            raise ValueError("original_ln_before: True is accepted only with parallel=False")
        choice("train_layer_norm", self.train_layer_norm, LAYER_NORMS)
        if self.drop is not None and not isinstance(self.drop, AdapterDrop):
            raise TypeError(f"drop: got {self.drop!r}; accepted are None and an AdapterDrop")

    def _check_width(self) -> None:
        if self.bottleneck is not None and self.reduction_factor is not None:
            raise ValueError("bottleneck, reduction_factor: got both; accepted is one of them")
        if self.bottleneck is None and self.reduction_factor is None:
            raise ValueError("bottleneck: got None and no reduction_factor; accepted is one of them")
        if self.bottleneck is not None:
            positive("bottleneck", self.bottleneck)
            return
        accepted = "a finite number above 0, or a mapping from layers and 'default' to such numbers"
        if isinstance(self.reduction_factor, Mapping):
            object.__setattr__(self, "reduction_factor", {str(k): v for k, v in self.reduction_factor.items()})
            if not self.reduction_factor:
                raise ValueError(f"reduction_factor: got {{}}; accepted are {accepted}")
            for layer, factor in self.reduction_factor.items():
                finite(f"reduction_factor[{layer!r}]", factor, above=0)
        else:
            finite("reduction_factor", self.reduction_factor, above=0, accepted=accepted)

    def _check_placements(self) -> None:
        accepted = f"one or both of {', '.join(PLACEMENTS)}"
        placements = several("placements", self.placements, accepted)
        if not placements or not different(placements) or any(p not in PLACEMENTS for p in placements):
            raise ValueError(f"placements: got {self.placements!r}; accepted are {accepted}")
        object.__setattr__(self, "placements", placements)

    def width(self, layer: int, hidden: int) -> int:
        """b in this layer of a model of this hidden size."""
        if self.bottleneck is not None:
            return self.bottleneck
        factor = self.reduction_factor
        if isinstance(factor, Mapping):
            if str(layer) not in factor and "default" not in factor:
                raise ValueError(f"reduction_factor: got {factor!r}, which names neither layer {layer} nor 'default'")
            factor = factor.get(str(layer), factor.get("default"))
        return max(int(hidden // factor), 1)

    def _default_width(self, **fields: Any) -> None:
        """A preset's width, where the caller gave none."""
        if self.bottleneck is None and self.reduction_factor is None:
            for field, value in fields.items():
                object.__setattr__(self, field, value)


@dataclass(frozen=True)
class HoulsbyConfig(BottleneckConfig):
    """y = LN(A(f) + x) after both sublayers; own copies of the encoder's LayerNorms train (arXiv:1902.00751).

    ``bottleneck`` is 64 where neither it nor ``reduction_factor`` is given. Other fields: :class:`BottleneckConfig`.
    """

    activation: str = "gelu"
    train_layer_norm: Literal["none", "encoder", "all"] = "encoder"

    def __post_init__(self) -> None:
        self._default_width(bottleneck=64)
        super().__post_init__()


@dataclass(frozen=True)
class PfeifferConfig(BottleneckConfig):
    """y = LN(f + A₁(LN(f + x)) + x) after the feed-forward network, one LN twice (arXiv:2005.00247).

    b is a sixteenth of the hidden size where neither ``bottleneck`` nor ``reduction_factor`` is given.
    """

    placements: tuple[str, ...] = ("output",)
    original_ln_before: bool = True

    def __post_init__(self) -> None:
        self._default_width(reduction_factor=16)
        super().__post_init__()


@dataclass(frozen=True)
class ParallelConfig(BottleneckConfig):
    """y = LN(f + s·A₁(x) + x) beside the feed-forward network, s = 4 (scaled parallel adapter, arXiv:2110.04366).

    b is half the hidden size where neither ``bottleneck`` nor ``reduction_factor`` is given.
    """

    placements: tuple[str, ...] = ("output",)
    parallel: bool = True
    scale: float | Literal["learned", "channel"] = 4.0
    init: Literal["houlsby", "bert", "mam_adapter", "lora"] = "mam_adapter"

    def __post_init__(self) -> None:
        self._default_width(reduction_factor=2)
        super().__post_init__()
