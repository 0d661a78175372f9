"""What this package registers: where Gemma's sites are, and how its static heads convert."""

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

# The first layer's input: whether the embeddings are scaled inside their module or behind it
# depends on the release of transformers.
_EMBEDDINGS = "layers.0"

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
    norms=("input_layernorm", "post_attention_layernorm"),
    adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
)

# Each sub-layer stands between two norms; its result is what comes out of the second.
_SANDWICH = dataclasses.replace(
    _LAYERS,
    attention=ResidualSite(output="post_attention_layernorm", residual="input_layernorm"),
    feed_forward=ResidualSite(
        output="post_feedforward_layernorm", residual="pre_feedforward_layernorm"
    ),
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
)

_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_SLIDING = {
    **_TINY,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}

GEMMA = ArchitectureSpec(
    name="gemma",
    model_types=("gemma",),
    backbone="transformers.models.gemma.modeling_gemma:GemmaModel",
    embeddings=_EMBEDDINGS,
    embeddings_from="input",
    layers=(_LAYERS,),
    norms=("norm",),
    pooling="last_token",
    # With tied embeddings so scaled, random weights write one token again and again.
    shares_layers=True,
    tiny={**_TINY, "tie_word_embeddings": False},
)
GEMMA2 = dataclasses.replace(
    GEMMA,
    name="gemma2",
    model_types=("gemma2",),
    backbone="transformers.models.gemma2.modeling_gemma2:Gemma2Model",
    layers=(_SANDWICH,),
    tiny=_SLIDING,
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    name="gemma3_text",
    model_types=("gemma3_text",),
    backbone="transformers.models.gemma3.modeling_gemma3:Gemma3TextModel",
    prefixes=("model",),
)

_ONE_LAYER = {"layers": 1, "activation_function": None}

_CLASSIFICATION = HeadRule(
    head_type="classification",
    weights={"score": "layers.0"},
    config={**_ONE_LAYER, "bias": False, "dropout_prob": 0.0},
)
_TAGGING = HeadRule(
    head_type="tagging",
    weights={"score": "layers.0"},
    config={**_ONE_LAYER, "dropout_prob": 0.1},
)
_LM = HeadRule(
    head_type="causal_lm",
    weights={"lm_head.weight": "weight"},
    config={**_ONE_LAYER, "layer_norm": False, "bias": False},
)
_CAPPED_LM = dataclasses.replace(_LM, config_from={"softcap": "final_logit_softcapping"})

# The classes of Gemma 3 that read images beside text are left out.
_HEADS = {
    GEMMA.name: {
        "GemmaForSequenceClassification": _CLASSIFICATION,
        "GemmaForTokenClassification": _TAGGING,
        "GemmaForCausalLM": _LM,
    },
    GEMMA2.name: {
        "Gemma2ForSequenceClassification": _CLASSIFICATION,
        "Gemma2ForTokenClassification": _TAGGING,
        "Gemma2ForCausalLM": _CAPPED_LM,
    },
    GEMMA3.name: {
        "Gemma3TextForSequenceClassification": _CLASSIFICATION,
        "Gemma3ForCausalLM": _CAPPED_LM,
    },
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """Gemma, Gemma 2, and Gemma 3 for text."""
    return [GEMMA, GEMMA2, GEMMA3]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for them."""
    return [
        HeadConversion(architecture=architecture, static_class=name, heads=(rule,))
        for architecture, rules in _HEADS.items()
        for name, rule in rules.items()
    ]
