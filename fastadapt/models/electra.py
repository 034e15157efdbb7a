"""ELECTRA."""

from __future__ import annotations

from torch import nn
from transformers.models.electra import modeling_electra as hf

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


class FusedElectraEmbeddings(FusedEmbeddings, hf.ElectraEmbeddings):
    """Fused :class:`ElectraEmbeddings`."""


class FusedElectraEncoder(FusedEncoder, hf.ElectraEncoder):
    """Fused :class:`ElectraEncoder`."""


class FusedElectraLayer(FusedLayer, hf.ElectraLayer):
    """Fused :class:`ElectraLayer`."""

    attention_class = hf.ElectraAttention


class FusedElectraSelfAttention(FusedSelfAttention, hf.ElectraSelfAttention):
    """Fused :class:`ElectraSelfAttention`."""


class FusedElectraSelfOutput(FusedOutput, hf.ElectraSelfOutput):
    """Fused :class:`ElectraSelfOutput`."""


class FusedElectraIntermediate(FusedIntermediate, hf.ElectraIntermediate):
    """Fused :class:`ElectraIntermediate`."""


class FusedElectraOutput(FusedOutput, hf.ElectraOutput):
    """Fused :class:`ElectraOutput`."""


class ElectraClassificationSlot(HeadSlot, hf.ElectraClassificationHead):
    """Slot of the sequence-classification head."""


class ElectraDiscriminatorSlot(HeadSlot, hf.ElectraDiscriminatorPredictions):
    """Slot of the discriminator's head."""


class ElectraSummarySlot(HeadSlot, hf.ElectraSequenceSummary):
    """Slot of the first half of the multiple-choice head; the second is a linear layer."""


class ElectraGeneratorSlot(HeadSlot, hf.ElectraGeneratorPredictions):
    """Slot of the first half of the masked-language-model head; the second is a linear layer."""


WIRING = Wiring(
    base=hf.ElectraModel,
    fused={
        hf.ElectraEmbeddings: FusedElectraEmbeddings,
        nn.LayerNorm: FusedNorm,
        nn.Dropout: FusedDropout,
        hf.ElectraEncoder: FusedElectraEncoder,
        hf.ElectraLayer: FusedElectraLayer,
        hf.ElectraSelfAttention: FusedElectraSelfAttention,
        hf.ElectraSelfOutput: FusedElectraSelfOutput,
        hf.ElectraIntermediate: FusedElectraIntermediate,
        hf.ElectraOutput: FusedElectraOutput,
    },
    heads={
        nn.Linear: LinearHead,
        hf.ElectraClassificationHead: ElectraClassificationSlot,
        hf.ElectraDiscriminatorPredictions: ElectraDiscriminatorSlot,
        hf.ElectraGeneratorPredictions: ElectraGeneratorSlot,
        hf.ElectraSequenceSummary: ElectraSummarySlot,
    },
    slots=(
        "sequence_summary",
        "classifier",
        "qa_outputs",
        "discriminator_predictions",
        "generator_predictions",
        "generator_lm_head",
    ),
    hub_name="electra",
)
