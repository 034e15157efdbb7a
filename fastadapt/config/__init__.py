"""The methods as frozen dataclasses; a field has the literature's name, and a bad value is refused at once."""

from fastadapt.config.bitfit import BitFitConfig, HeadConfig, LayerNormConfig
from fastadapt.config.bottleneck import BottleneckConfig, HoulsbyConfig, ParallelConfig, PfeifferConfig
from fastadapt.config.drop import AdapterDrop
from fastadapt.config.fusion import FusionConfig
from fastadapt.config.lora import LoRAConfig
from fastadapt.config.masked import MaskedAdapterConfig
from fastadapt.config.prefix import MAMConfig, PrefixConfig

__all__ = [
    "AdapterDrop",
    "BitFitConfig",
    "BottleneckConfig",
    "FusionConfig",
    "HeadConfig",
    "HoulsbyConfig",
    "LayerNormConfig",
    "LoRAConfig",
    "MAMConfig",
    "MaskedAdapterConfig",
    "ParallelConfig",
    "PfeifferConfig",
    "PrefixConfig",
]
