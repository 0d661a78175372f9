"""What this package registers: where Qwen's sites are, and how its static heads convert."""

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


def _qwen(name: str, prefix: str, **tiny: int) -> ArchitectureSpec:
    """One generation; they differ in what happens between a projection and the attention."""
    return ArchitectureSpec(
        name=name,
        model_types=(name,),
        backbone=f"transformers.models.{name}.modeling_{name}:{prefix}Model",
        embeddings="embed_tokens",
        layers=(_LAYERS,),
        norms=("norm",),
        pooling="last_token",
        shares_layers=True,
        prefixes=("transformer",),
        tiny={**_TINY, **tiny},
    )


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

_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

QWEN2 = _qwen("qwen2", "Qwen2")
# Heads of another size than the width gives, as the small models of this generation have.
QWEN3 = _qwen("qwen3", "Qwen3", head_dim=16)

_ONE_LAYER = {"layers": 1, "activation_function": None}

_HEADS = {
    "ForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"score": "layers.0"},
        config={**_ONE_LAYER, "bias": False, "dropout_prob": 0.0},
    ),
    "ForTokenClassification": HeadRule(
        head_type="tagging",
        weights={"score": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.1},
    ),
    "ForQuestionAnswering": HeadRule(
        head_type="question_answering",
        weights={"qa_outputs": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.0},
        output="start_logits",
    ),
    "ForCausalLM": HeadRule(
        head_type="causal_lm",
        weights={"lm_head.weight": "weight"},
        config={**_ONE_LAYER, "layer_norm": False, "bias": False},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """Qwen2, which Qwen2.5 is built as too, and Qwen3."""
    return [QWEN2, QWEN3]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for them."""
    return [
        HeadConversion(architecture=spec.name, static_class=prefix + name, heads=(rule,))
        for spec, prefix in ((QWEN2, "Qwen2"), (QWEN3, "Qwen3"))
        for name, rule in _HEADS.items()
    ]
