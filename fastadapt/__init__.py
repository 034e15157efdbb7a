"""fastadapt: fused kernels for parameter-efficient adaptation of Transformer encoders."""

from fastadapt import ops
from fastadapt.adapt import accelerate, activate, adapt, adaptations, refresh, remove, restore, unload
from fastadapt.config import BottleneckConfig, HoulsbyConfig, ParallelConfig, PfeifferConfig
from fastadapt.dispatch import backend

__version__ = "0.1.0"
__all__ = [
    "BottleneckConfig",
    "HoulsbyConfig",
    "ParallelConfig",
    "PfeifferConfig",
    "accelerate",
    "activate",
    "adapt",
    "adaptations",
    "backend",
    "ops",
    "refresh",
    "remove",
    "restore",
    "unload",
]
