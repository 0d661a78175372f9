"""What this package registers: where LLaMA's sites are, and how its static heads convert."""

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

LLAMA = ArchitectureSpec(
    name="llama",
    model_types=("llama",),
    backbone="transformers.models.llama.modeling_llama:LlamaModel",
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
            adapterhub={
                "attention": "attention_adapters",
                "feed_forward": "output_adapters",
                # Files of that library call each by the other's name.
                "mlp_in": "mlp.down_proj",
                "mlp_out": "mlp.up_proj",
            },
        ),
    ),
    norms=("norm",),
    pooling="last_token",
    shares_layers=True,
    prefixes=("transformer",),
    tiny={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
)

_ONE_LAYER = {"layers": 1, "activation_function": None}

_HEADS = {
    "LlamaForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"score": "layers.0"},
        config={**_ONE_LAYER, "bias": False, "dropout_prob": 0.0},
    ),
    "LlamaForTokenClassification": HeadRule(
        head_type="tagging",
        weights={"score": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.1},
    ),
    "LlamaForQuestionAnswering": HeadRule(
        head_type="question_answering",
        weights={"qa_outputs": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.0},
        output="start_logits",
    ),
    "LlamaForCausalLM": HeadRule(
        head_type="causal_lm",
        weights={"lm_head.weight": "weight"},
        config={**_ONE_LAYER, "layer_norm": False, "bias": False},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """LLaMA."""
    return [LLAMA]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for LLaMA."""
    return [
        HeadConversion(architecture=LLAMA.name, static_class=name, heads=(rule,))
        for name, rule in _HEADS.items()
    ]
