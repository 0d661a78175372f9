"""What this package registers: where OLMo's sites are, and how its static heads convert."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from flexheads import (
    ArchitectureSpec,
    HeadConversion,
    HeadRule,
    LayerSpec,
    ResidualSite,
    hookimpl,
)

# Its norms have no weights, so none are named.
_LAYERS = LayerSpec(
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
    adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
)

# The norms stand behind the sub-layers, on their results alone.
_REORDERED = dataclasses.replace(
    _LAYERS,
    attention=ResidualSite(output="post_attention_layernorm", residual="self_attn"),
    feed_forward=ResidualSite(output="post_feedforward_layernorm", residual="mlp"),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)

OLMO = ArchitectureSpec(
    name="olmo",
    model_types=("olmo",),
    backbone="transformers.models.olmo.modeling_olmo:OlmoModel",
    embeddings="embed_tokens",
    layers=(_LAYERS,),
    pooling="last_token",
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
    },
)
OLMO2 = dataclasses.replace(
    OLMO,
    name="olmo2",
    model_types=("olmo2",),
    backbone="transformers.models.olmo2.modeling_olmo2:Olmo2Model",
    layers=(_REORDERED,),
    norms=("norm",),
)

_ONE_LAYER = {"layers": 1, "activation_function": None}

# The classes that classify are younger than the oldest release of transformers that this serves.
_HEADS = {
    "ForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"score": "layers.0"},
        config={**_ONE_LAYER, "bias": False, "dropout_prob": 0.0},
    ),
    "ForCausalLM": HeadRule(
        head_type="causal_lm",
        weights={"lm_head.weight": "weight"},
        config={**_ONE_LAYER, "layer_norm": False, "bias": False},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """OLMo, and OLMo 2."""
    return [OLMO, OLMO2]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for them."""
    return [
        HeadConversion(architecture=spec.name, static_class=prefix + name, heads=(rule,))
        for spec, prefix in ((OLMO, "Olmo"), (OLMO2, "Olmo2"))
        for name, rule in _HEADS.items()
    ]
