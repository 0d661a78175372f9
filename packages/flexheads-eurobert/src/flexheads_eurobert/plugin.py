"""What this package registers: where EuroBERT's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import (
    ArchitectureSpec,
    HeadConversion,
    HeadRule,
    LayerSpec,
    ResidualSite,
    hookimpl,
)

EUROBERT = ArchitectureSpec(
    name="eurobert",
    model_types=("eurobert",),
    backbone="transformers.models.eurobert.modeling_eurobert:EuroBertModel",
    embeddings="embed_tokens",
    layers=(
        LayerSpec(
            path="layers",
            attention=ResidualSite(output="self_attn.o_proj", residual="input_layernorm"),
            feed_forward=ResidualSite(output="mlp", residual="post_attention_layernorm"),
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            attention_output="self_attn.o_proj",
            mlp_in="mlp.up_proj",
            mlp_out="mlp.down_proj",
            self_attention="self_attn",
            norms=("input_layernorm", "post_attention_layernorm"),
            adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
        ),
    ),
    norms=("norm",),
    pooling="first_token",
    shares_layers=True,
    tiny={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "mask_token_id": 3,
    },
)

_ONE_LAYER = {"layers": 1, "activation_function": None}

_HEADS = {
    "EuroBertForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"dense": "layers.0", "classifier": "layers.1"},
        config={"layers": 2, "activation_function": "gelu", "dropout_prob": 0.0},
        config_by={
            "pooling": ("classifier_pooling", {"bos": None, "mean": "mean", "late": None}),
            "late": ("classifier_pooling", {"bos": False, "mean": False, "late": True}),
        },
    ),
    "EuroBertForTokenClassification": HeadRule(
        head_type="tagging",
        weights={"classifier": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.0},
    ),
    "EuroBertForMaskedLM": HeadRule(
        head_type="masked_lm",
        weights={"lm_head.weight": "weight", "lm_head.bias": "bias"},
        config={**_ONE_LAYER, "layer_norm": False},
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
    return [
        HeadConversion(architecture=EUROBERT.name, static_class=name, heads=(rule,))
        for name, rule in _HEADS.items()
    ]
