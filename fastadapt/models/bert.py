"""BERT."""

from __future__ import annotations

from torch import nn
from transformers.models.bert import modeling_bert as hf

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


class FusedBertEmbeddings(FusedEmbeddings, hf.BertEmbeddings):
    """Fused :class:`BertEmbeddings`."""


class FusedBertEncoder(FusedEncoder, hf.BertEncoder):
    """Fused :class:`BertEncoder`."""


class FusedBertLayer(FusedLayer, hf.BertLayer):
    """Fused :class:`BertLayer`."""

    attention_class = hf.BertAttention


class FusedBertSelfAttention(FusedSelfAttention, hf.BertSelfAttention):
    """Fused :class:`BertSelfAttention`."""


class FusedBertSelfOutput(FusedOutput, hf.BertSelfOutput):
    """Fused :class:`BertSelfOutput`."""


class FusedBertIntermediate(FusedIntermediate, hf.BertIntermediate):
    """Fused :class:`BertIntermediate`."""


class FusedBertOutput(FusedOutput, hf.BertOutput):
    """Fused :class:`BertOutput`."""


class BertMLMSlot(HeadSlot, hf.BertOnlyMLMHead):
    """Slot of the masked-language-model head."""


class BertNSPSlot(HeadSlot, hf.BertOnlyNSPHead):
    """Slot of the next-sentence head."""


class BertPreTrainingSlot(HeadSlot, hf.BertPreTrainingHeads):
    """Slot of both pretraining heads."""


_FUSED: dict[type, type] = {
    hf.BertEmbeddings: FusedBertEmbeddings,
    nn.LayerNorm: FusedNorm,
    nn.Dropout: FusedDropout,
    hf.BertEncoder: FusedBertEncoder,
    hf.BertLayer: FusedBertLayer,
    hf.BertSelfAttention: FusedBertSelfAttention,
    hf.BertSelfOutput: FusedBertSelfOutput,
    hf.BertIntermediate: FusedBertIntermediate,
    hf.BertOutput: FusedBertOutput,
}

if hasattr(hf, "BertSdpaSelfAttention"):  # transformers 4

    class FusedBertSdpaSelfAttention(FusedSelfAttention, hf.BertSdpaSelfAttention):
        """Fused :class:`BertSdpaSelfAttention`."""

    _FUSED[hf.BertSdpaSelfAttention] = FusedBertSdpaSelfAttention

WIRING = Wiring(
    base=hf.BertModel,
    fused=_FUSED,
    heads={
        nn.Linear: LinearHead,
        hf.BertOnlyMLMHead: BertMLMSlot,
        hf.BertOnlyNSPHead: BertNSPSlot,
        hf.BertPreTrainingHeads: BertPreTrainingSlot,
    },
    slots=("classifier", "qa_outputs", "cls"),
    hub_name="bert",
)
