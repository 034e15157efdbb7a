"""fastadapt: fused kernels for parameter-efficient adaptation of Transformer encoders."""

from fastadapt import ops
from fastadapt.adapt import accelerate, activate, adapt, adaptations, load, refresh, remove, restore, save, unload
from fastadapt.config import BottleneckConfig, HoulsbyConfig, ParallelConfig, PfeifferConfig
from fastadapt.dispatch import backend
from fastadapt.report import explain, parameter_report

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
    "explain",
    "load",
    "ops",
    "parameter_report",
    "refresh",
    "remove",
    "restore",
    "save",
    "unload",
]
