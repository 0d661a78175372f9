"""What this package registers: where OPT's sites are, and how its static heads convert."""

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

OPT = ArchitectureSpec(
    name="opt",
    model_types=("opt",),
    backbone="transformers.models.opt.modeling_opt:OPTModel",
    embeddings="decoder.embed_tokens",
    entry="decoder",
    layers=(
        LayerSpec(
            path="decoder.layers",
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
            folded=True,  # the feed-forward network
            adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
        ),
    ),
    norms=("decoder.final_layer_norm",),
    pooling="last_token",
    # The one with 350 million parameters normalises behind each sub-layer, and has no last norm.
    shares_layers=True,
    requires={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    tiny={
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
)

_ONE_LAYER = {"layers": 1, "activation_function": None}

_HEADS = {
    "OPTForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"score": "layers.0"},
        config={**_ONE_LAYER, "bias": False, "dropout_prob": 0.0},
    ),
    "OPTForQuestionAnswering": HeadRule(
        head_type="question_answering",
        weights={"qa_outputs": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.0},
        output="start_logits",
    ),
    "OPTForCausalLM": HeadRule(
        head_type="causal_lm",
        weights={"lm_head.weight": "weight"},
        config={**_ONE_LAYER, "layer_norm": False, "bias": False},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """OPT."""
    return [OPT]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for OPT."""
    return [
        HeadConversion(architecture=OPT.name, static_class=name, heads=(rule,))
        for name, rule in _HEADS.items()
    ]
