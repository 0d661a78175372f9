"""What this package registers: where ESM's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, ResidualSite, hookimpl
from flexheads.layouts import ENCODER_HEADS, NORM_LAST_LAYERS, TINY, conversions

# The norm in the embeddings is left out: only some of the models have it.
ESM = ArchitectureSpec(
    name="esm",
    model_types=("esm",),
    backbone="transformers.models.esm.modeling_esm:EsmModel",
    embeddings="embeddings",
    layers=(
        replace(
            NORM_LAST_LAYERS,
            attention=ResidualSite(
                output="attention.output.dropout", residual="attention.LayerNorm"
            ),
            feed_forward=ResidualSite(output="output.dropout", residual="LayerNorm"),
            norms=("attention.LayerNorm", "LayerNorm"),
        ),
    ),
    norms=("encoder.emb_layer_norm_after",),
    pooling="first_token",
    pooler=True,
    shares_layers=True,
    tiny={
        **TINY,
        "mask_token_id": 98,
        "pad_token_id": 1,
        "position_embedding_type": "rotary",
        "token_dropout": True,
    },
)

# Folding is left out: it predicts atoms, which no type of flexible head does.
_HEADS = {
    "ForSequenceClassification": ENCODER_HEADS["ForSequenceClassification"],
    "ForTokenClassification": ENCODER_HEADS["ForTokenClassification"],
    "ForMaskedLM": HeadRule(
        head_type="masked_lm",
        weights={
            "lm_head.dense": "layers.0.dense",
            "lm_head.layer_norm": "layers.0.norm",
            "lm_head.decoder.weight": "weight",
            "lm_head.bias": "bias",
        },
        config={"layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """ESM."""
    return [ESM]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """The head classes that transformers has for ESM, but for the one that folds proteins."""
    return conversions(ESM, "Esm", _HEADS)
