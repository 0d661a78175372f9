"""What many architectures have in common, for packages to begin their rows with.

Layers are whole values: ``dataclasses.replace`` says in what an architecture differs. Heads are
listed by the ends of their class names, and `conversions` puts what comes before to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexheads.specs import (
    ArchitectureSpec,
    FusedBlock,
    HeadConversion,
    HeadRule,
    LayerSpec,
    ResidualSite,
)

_BESIDE = {"attention": "attention_adapters", "feed_forward": "output_adapters"}

#: A norm before each sub-layer, and a gated feed-forward network.
GATED_LAYERS = LayerSpec(
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
    adapterhub=_BESIDE,
)

#: A norm behind each sum, and modules named after what they are to an attention.
NORM_LAST_LAYERS = LayerSpec(
    path="encoder.layer",
    attention=ResidualSite(
        output="attention.output.dropout",
        residual="attention",
        norm="attention.output.LayerNorm",
    ),
    feed_forward=ResidualSite(
        output="output.dropout", residual="intermediate", norm="output.LayerNorm"
    ),
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    mlp_in="intermediate.dense",
    mlp_out="output.dense",
    self_attention="attention.self",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    adapterhub={"attention": "attention.output", "feed_forward": "output"},
)

#: The encoder of a model with a decoder: a norm before each sub-layer.
ENCODER_LAYERS = LayerSpec(
    path="encoder.layers",
    side="encoder",
    attention=ResidualSite(output="self_attn.out_proj", residual="self_attn_layer_norm"),
    feed_forward=ResidualSite(output="fc2", residual="final_layer_norm"),
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn.out_proj",
    mlp_in="fc1",
    mlp_out="fc2",
    self_attention="self_attn",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    adapterhub=_BESIDE,
)

#: The decoder beside it.
DECODER_LAYERS = replace(
    ENCODER_LAYERS,
    path="decoder.layers",
    side="decoder",
    cross_attention=ResidualSite(
        output="encoder_attn.out_proj", residual="encoder_attn_layer_norm"
    ),
    cross_query="encoder_attn.q_proj",
    cross_key="encoder_attn.k_proj",
    cross_value="encoder_attn.v_proj",
    cross_attention_output="encoder_attn.out_proj",
    encoder_attention="encoder_attn",
    norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    adapterhub={**_BESIDE, "cross_attention": "cross_attention_adapters"},
)


def thirds(**how: Any) -> dict[str, FusedBlock]:
    """The blocks of one projection that gives queries, keys and values, in this order.

    Args:
        how: What else there is to say of each block, see `FusedBlock`.
    """
    return {role: FusedBlock(i, 3, **how) for i, role in enumerate(("query", "key", "value"))}


#: The size of a tiny model, where the configuration has the usual names.
TINY: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}

ONE_LAYER: Mapping[str, Any] = {"layers": 1, "activation_function": None}

_ANSWERS = HeadRule(
    head_type="question_answering",
    weights={"qa_outputs": "layers.0"},
    config={**ONE_LAYER, "dropout_prob": 0.0},
    output="start_logits",
)


def _lm(head_type: str) -> HeadRule:
    return HeadRule(
        head_type=head_type,
        weights={
            "lm_head.dense": "layers.0.dense",
            "lm_head.layer_norm": "layers.0.norm",
            "lm_head.decoder.weight": "weight",
            "lm_head.decoder.bias": "bias",
        },
        config={"layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True},
        aliases={"lm_head.bias": "lm_head.decoder.bias"},
    )


#: Heads of models that read from left to right: one matrix each.
DECODER_HEADS: Mapping[str, HeadRule] = {
    "ForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"score": "layers.0"},
        config={**ONE_LAYER, "bias": False, "dropout_prob": 0.0},
    ),
    "ForTokenClassification": HeadRule(
        head_type="tagging",
        weights={"score": "layers.0"},
        config={**ONE_LAYER, "dropout_prob": 0.1},
    ),
    "ForQuestionAnswering": _ANSWERS,
    "ForCausalLM": HeadRule(
        head_type="causal_lm",
        weights={"lm_head.weight": "weight"},
        config={**ONE_LAYER, "layer_norm": False, "bias": False},
    ),
}

#: Heads of models that read in both directions: two layers on the first token, and for language.
ENCODER_HEADS: Mapping[str, HeadRule] = {
    "ForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"classifier.dense": "layers.0", "classifier.out_proj": "layers.1"},
        config={"layers": 2, "activation_function": "tanh", "use_pooler": False},
    ),
    "ForMultipleChoice": HeadRule(
        head_type="multiple_choice",
        weights={"classifier": "layers.0"},
        config={**ONE_LAYER, "use_pooler": True},
    ),
    "ForTokenClassification": HeadRule(
        head_type="tagging", weights={"classifier": "layers.0"}, config=ONE_LAYER
    ),
    "ForQuestionAnswering": _ANSWERS,
    "ForMaskedLM": _lm("masked_lm"),
    "ForCausalLM": _lm("causal_lm"),
}


def conversions(
    spec: ArchitectureSpec, words: str, rules: Mapping[str, HeadRule | tuple[HeadRule, ...]]
) -> list[HeadConversion]:
    """The conversions of an architecture whose classes begin alike.

    Args:
        spec: The architecture.
        words: What the names of its classes begin with, for example ``"Acme"``.
        rules: What each name ends in, for example ``"ForCausalLM"``, and the rule, or the rules
            where the class becomes several heads.
    """
    return [
        HeadConversion(
            architecture=spec.name,
            static_class=words + ending,
            heads=(rule,) if isinstance(rule, HeadRule) else rule,
        )
        for ending, rule in rules.items()
    ]
