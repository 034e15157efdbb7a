"""RoBERTa."""

from __future__ import annotations

from torch import nn
from transformers.models.roberta import modeling_roberta as hf

from fastadapt.models.wiring import Wiring
from fastadapt.modules.heads import HeadSlot, LinearHead
from fastadapt.modules.sublayers import (
    FusedDropout,
    FusedEmbeddings,
    FusedIntermediate,
    FusedLayer,
    FusedNorm,
    FusedOutput,
    FusedSelfAttention,
)
from fastadapt.modules.unpad import FusedEncoder


class FusedRobertaEmbeddings(FusedEmbeddings, hf.RobertaEmbeddings):
    """Fused :class:`RobertaEmbeddings`."""


class FusedRobertaEncoder(FusedEncoder, hf.RobertaEncoder):
    """Fused :class:`RobertaEncoder`."""


class FusedRobertaLayer(FusedLayer, hf.RobertaLayer):
    """Fused :class:`RobertaLayer`."""

    attention_class = hf.RobertaAttention


class FusedRobertaSelfAttention(FusedSelfAttention, hf.RobertaSelfAttention):
    """Fused :class:`RobertaSelfAttention`."""


class FusedRobertaSelfOutput(FusedOutput, hf.RobertaSelfOutput):
    """Fused :class:`RobertaSelfOutput`."""


class FusedRobertaIntermediate(FusedIntermediate, hf.RobertaIntermediate):
    """Fused :class:`RobertaIntermediate`."""


class FusedRobertaOutput(FusedOutput, hf.RobertaOutput):
    """Fused :class:`RobertaOutput`."""


class RobertaClassificationSlot(HeadSlot, hf.RobertaClassificationHead):
    """Slot of the sequence-classification head."""


class RobertaLMSlot(HeadSlot, hf.RobertaLMHead):
    """Slot of the masked-language-model head."""


_FUSED: dict[type, type] = {
    hf.RobertaEmbeddings: FusedRobertaEmbeddings,
    nn.LayerNorm: FusedNorm,
    nn.Dropout: FusedDropout,
    hf.RobertaEncoder: FusedRobertaEncoder,
    hf.RobertaLayer: FusedRobertaLayer,
    hf.RobertaSelfAttention: FusedRobertaSelfAttention,
    hf.RobertaSelfOutput: FusedRobertaSelfOutput,
    hf.RobertaIntermediate: FusedRobertaIntermediate,
    hf.RobertaOutput: FusedRobertaOutput,
}

if hasattr(hf, "RobertaSdpaSelfAttention"):  # transformers 4

    class FusedRobertaSdpaSelfAttention(FusedSelfAttention, hf.RobertaSdpaSelfAttention):
        """Fused :class:`RobertaSdpaSelfAttention`."""

    _FUSED[hf.RobertaSdpaSelfAttention] = FusedRobertaSdpaSelfAttention

WIRING = Wiring(
    base=hf.RobertaModel,
    fused=_FUSED,
    heads={
        nn.Linear: LinearHead,
        hf.RobertaClassificationHead: RobertaClassificationSlot,
        hf.RobertaLMHead: RobertaLMSlot,
    },
    slots=("classifier", "qa_outputs", "lm_head"),
    hub_name="roberta",
)
