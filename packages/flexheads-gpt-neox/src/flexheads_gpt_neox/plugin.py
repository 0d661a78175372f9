"""What this package registers: where GPT-NeoX's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import DECODER_HEADS, ONE_LAYER, TINY, conversions, thirds

GPT_NEOX = ArchitectureSpec(
    name="gpt_neox",
    model_types=("gpt_neox",),
    backbone="transformers.models.gpt_neox.modeling_gpt_neox:GPTNeoXModel",
    embeddings="embed_in",
    layers=(
        LayerSpec(
            path="layers",
            attention=ResidualSite(output="post_attention_dropout", residual="input_layernorm"),
            feed_forward=ResidualSite(
                output="post_mlp_dropout",
                residual="post_attention_layernorm",
                beside="post_attention_dropout",
                beside_if="use_parallel_residual",
            ),
            query="attention.query_key_value",
            key="attention.query_key_value",
            value="attention.query_key_value",
            attention_output="attention.dense",
            mlp_in="mlp.dense_h_to_4h",
            mlp_out="mlp.dense_4h_to_h",
            fused=thirds(groups="num_attention_heads"),  # head by head
            self_attention="attention",
            norms=("input_layernorm", "post_attention_layernorm"),
            adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
        ),
    ),
    norms=("final_layer_norm",),
    pooling="last_token",
    shares_layers=True,
    tiny={**TINY, "pad_token_id": 0},
)

# Later releases of transformers 5 have another name for the output matrix.
_LM_NAMES = ("embed_out.weight", "lm_head.weight")

_HEADS = {
    "ForSequenceClassification": DECODER_HEADS["ForSequenceClassification"],
    "ForTokenClassification": HeadRule(
        head_type="tagging",
        weights={"classifier": "layers.0"},
        config={**ONE_LAYER, "dropout_prob": 0.1},
    ),
    "ForQuestionAnswering": DECODER_HEADS["ForQuestionAnswering"],
    "ForCausalLM": HeadRule(
        head_type="causal_lm",
        weights=dict.fromkeys(_LM_NAMES, "weight"),
        config={**ONE_LAYER, "layer_norm": False, "bias": False},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """GPT-NeoX."""
    return [GPT_NEOX]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for GPT-NeoX."""
    return conversions(GPT_NEOX, "GPTNeoX", _HEADS)
