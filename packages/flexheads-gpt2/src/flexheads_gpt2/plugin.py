"""What this package registers: where GPT-2's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import DECODER_HEADS, ENCODER_HEADS, conversions, thirds

GPT2 = ArchitectureSpec(
    name="gpt2",
    model_types=("gpt2",),
    backbone="transformers.models.gpt2.modeling_gpt2:GPT2Model",
    embeddings="wte",
    late_embeddings="drop",
    layers=(
        LayerSpec(
            path="h",
            attention=ResidualSite(output="attn.resid_dropout", residual="ln_1"),
            feed_forward=ResidualSite(output="mlp", residual="ln_2"),
            query="attn.c_attn",
            key="attn.c_attn",
            value="attn.c_attn",
            fused=thirds(),
            attention_output="attn.c_proj",
            mlp_in="mlp.c_fc",
            mlp_out="mlp.c_proj",
            self_attention="attn",
            norms=("ln_1", "ln_2"),
            adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
        ),
    ),
    norms=("ln_f",),
    pooling="last_token",
    shares_layers=True,
    tiny={
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 99,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
)

_HEADS = {
    "ForSequenceClassification": DECODER_HEADS["ForSequenceClassification"],
    "ForTokenClassification": ENCODER_HEADS["ForTokenClassification"],
    "ForQuestionAnswering": DECODER_HEADS["ForQuestionAnswering"],
    "LMHeadModel": DECODER_HEADS["ForCausalLM"],
}

# Two heads: choices are read where ``mc_token_ids`` says, which should be each row's last token.
_DOUBLE = (
    _HEADS["LMHeadModel"],
    HeadRule(
        head_type="multiple_choice",
        weights={"multiple_choice_head.summary": "layers.0"},
        config={"layers": 1},
        config_from={"dropout_prob": "summary_first_dropout"},
        config_by={
            "pooling": ("summary_type", {"cls_index": None, "first": "first_token"}),
            "activation_function": ("summary_activation", {None: None}),
        },
        suffix="_choice",
        output="mc_logits",
    ),
)


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """GPT-2."""
    return [GPT2]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for GPT-2."""
    return conversions(GPT2, "GPT2", {**_HEADS, "DoubleHeadsModel": _DOUBLE})
