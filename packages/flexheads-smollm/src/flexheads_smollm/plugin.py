"""What this package registers: where SmolLM3's sites are, and how its static heads convert."""

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

# Models of SmolLM and SmolLM2 are LLaMA models, and belong to that package.
SMOLLM3 = ArchitectureSpec(
    name="smollm3",
    model_types=("smollm3",),
    backbone="transformers.models.smollm3.modeling_smollm3:SmolLM3Model",
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
        "no_rope_layers": [1, 0],
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)

_ONE_LAYER = {"layers": 1, "activation_function": None}

_HEADS = {
    "SmolLM3ForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"score": "layers.0"},
        config={**_ONE_LAYER, "bias": False, "dropout_prob": 0.0},
    ),
    "SmolLM3ForTokenClassification": HeadRule(
        head_type="tagging",
        weights={"score": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.1},
    ),
    "SmolLM3ForQuestionAnswering": HeadRule(
        head_type="question_answering",
        weights={"qa_outputs": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.0},
        output="start_logits",
    ),
    "SmolLM3ForCausalLM": HeadRule(
        head_type="causal_lm",
        weights={"lm_head.weight": "weight"},
        config={**_ONE_LAYER, "layer_norm": False, "bias": False},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """SmolLM3."""
    return [SMOLLM3]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for SmolLM3."""
    return [
        HeadConversion(architecture=SMOLLM3.name, static_class=name, heads=(rule,))
        for name, rule in _HEADS.items()
    ]
