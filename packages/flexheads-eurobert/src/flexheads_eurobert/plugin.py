"""What this package registers: where EuroBERT's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, hookimpl
from flexheads.layouts import GATED_LAYERS, ONE_LAYER, TINY, conversions

EUROBERT = ArchitectureSpec(
    name="eurobert",
    model_types=("eurobert",),
    backbone="transformers.models.eurobert.modeling_eurobert:EuroBertModel",
    embeddings="embed_tokens",
    layers=(GATED_LAYERS,),
    norms=("norm",),
    pooling="first_token",
    shares_layers=True,
    tiny={
        **TINY,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "mask_token_id": 3,
    },
)

_HEADS = {
    "ForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"dense": "layers.0", "classifier": "layers.1"},
        config={"layers": 2, "activation_function": "gelu", "dropout_prob": 0.0},
        config_by={
            "pooling": ("classifier_pooling", {"bos": None, "mean": "mean", "late": None}),
            "late": ("classifier_pooling", {"bos": False, "mean": False, "late": True}),
        },
    ),
    "ForTokenClassification": HeadRule(
        head_type="tagging",
        weights={"classifier": "layers.0"},
        config={**ONE_LAYER, "dropout_prob": 0.0},
    ),
    "ForMaskedLM": HeadRule(
        head_type="masked_lm",
        weights={"lm_head.weight": "weight", "lm_head.bias": "bias"},
        config={**ONE_LAYER, "layer_norm": False},
        config_from={"bias": "mlp_bias"},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """EuroBERT."""
    return [EUROBERT]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for EuroBERT."""
    return conversions(EUROBERT, "EuroBert", _HEADS)
