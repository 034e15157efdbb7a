"""fastadapt: fused kernels for parameter-efficient adaptation of Transformer encoders."""

from fastadapt import ops
from fastadapt.adapt import (
    accelerate,
    activate,
    adapt,
    adaptations,
    eject,
    keep_neurons,
    load,
    refresh,
    remove,
    restore,
    save,
    skip_padding,
    unload,
)
from fastadapt.capturing import capture
from fastadapt.config import (
    AdapterDrop,
    BitFitConfig,
    BottleneckConfig,
    FusionConfig,
    HeadConfig,
    HoulsbyConfig,
    LayerNormConfig,
    LoRAConfig,
    MAMConfig,
    MaskedAdapterConfig,
    ParallelConfig,
    PfeifferConfig,
    PrefixConfig,
)
from fastadapt.dispatch import backend
from fastadapt.merging import merge, swap, unmerge
from fastadapt.modules.lora_linear import LoRALinear
from fastadapt.modules.step import auxiliary_loss
from fastadapt.optim import param_groups
from fastadapt.report import explain, parameter_report
from fastadapt.routing import route

__version__ = "0.1.0"
__all__ = [
    "AdapterDrop",
    "BitFitConfig",
    "BottleneckConfig",
    "FusionConfig",
    "HeadConfig",
    "HoulsbyConfig",
    "LayerNormConfig",
    "LoRAConfig",
    "LoRALinear",
    "MAMConfig",
    "MaskedAdapterConfig",
    "ParallelConfig",
    "PfeifferConfig",
    "PrefixConfig",
    "accelerate",
    "activate",
    "adapt",
    "adaptations",
    "auxiliary_loss",
    "backend",
    "capture",
    "eject",
    "explain",
    "keep_neurons",
    "load",
    "merge",
    "ops",
    "param_groups",
    "parameter_report",
    "refresh",
    "remove",
    "restore",
    "route",
    "save",
    "skip_padding",
    "swap",
    "unload",
    "unmerge",
]
