"""fastadapt: fused kernels for parameter-efficient adaptation of Transformer encoders."""

from fastadapt import ops
from fastadapt.dispatch import backend

__version__ = "0.1.0"
__all__ = ["backend", "ops"]
