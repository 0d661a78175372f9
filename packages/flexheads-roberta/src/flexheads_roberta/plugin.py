"""What this package registers: the sites of RoBERTa's family, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexheads import ArchitectureSpec, HeadConversion, ResidualSite, hookimpl
from flexheads.layouts import ENCODER_HEADS, NORM_LAST_LAYERS, TINY, conversions

ROBERTA = ArchitectureSpec(
    name="roberta",
    model_types=("roberta",),
    backbone="transformers.models.roberta.modeling_roberta:RobertaModel",
    embeddings="embeddings",
    layers=(NORM_LAST_LAYERS,),
    norms=("embeddings.LayerNorm",),
    pooling="first_token",
    pooler=True,
    shares_layers=True,
    tiny={**TINY, "pad_token_id": 1},
)

XLM_ROBERTA = replace(
    ROBERTA,
    name="xlm-roberta",
    model_types=("xlm-roberta",),
    backbone="transformers.models.xlm_roberta.modeling_xlm_roberta:XLMRobertaModel",
)

CAMEMBERT = replace(
    ROBERTA,
    name="camembert",
    model_types=("camembert",),
    backbone="transformers.models.camembert.modeling_camembert:CamembertModel",
)

# Its norms come first, and its embeddings have none.
XLM_ROBERTA_XL = replace(
    ROBERTA,
    name="xlm-roberta-xl",
    model_types=("xlm-roberta-xl",),
    backbone="transformers.models.xlm_roberta_xl.modeling_xlm_roberta_xl:XLMRobertaXLModel",
    layers=(
        replace(
            NORM_LAST_LAYERS,
            attention=ResidualSite(
                output="attention.output.dropout", residual="attention.self_attn_layer_norm"
            ),
            feed_forward=ResidualSite(output="output.dense", residual="LayerNorm"),
            norms=("attention.self_attn_layer_norm", "LayerNorm"),
        ),
    ),
    norms=("encoder.LayerNorm",),
)

# What each is called, and the words that its classes begin with.
_FAMILY = (
    (ROBERTA, "Roberta"),
    (XLM_ROBERTA, "XLMRoberta"),
    (CAMEMBERT, "Camembert"),
    (XLM_ROBERTA_XL, "XLMRobertaXL"),
)


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """RoBERTa, XLM-RoBERTa, CamemBERT and XLM-RoBERTa-XL."""
    return [spec for spec, _ in _FAMILY]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for them."""
    return [
        conversion
        for spec, words in _FAMILY
        for conversion in conversions(spec, words, ENCODER_HEADS)
    ]
