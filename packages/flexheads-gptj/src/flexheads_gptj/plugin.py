"""What this package registers: where GPT-J's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import DECODER_HEADS, ONE_LAYER, conversions

GPTJ = ArchitectureSpec(
    name="gptj",
    model_types=("gptj",),
    backbone="transformers.models.gptj.modeling_gptj:GPTJModel",
    embeddings="drop",
    layers=(
        LayerSpec(
            path="h",
            attention=ResidualSite(output="attn.resid_dropout", residual="ln_1"),
            # Both sub-layers read the same norm; the attention's result is added first.
            feed_forward=ResidualSite(output="mlp", residual="ln_1", beside="attn.resid_dropout"),
            query="attn.q_proj",
            key="attn.k_proj",
            value="attn.v_proj",
            attention_output="attn.out_proj",
            mlp_in="mlp.fc_in",
            mlp_out="mlp.fc_out",
            self_attention="attn",
            norms=("ln_1",),
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
        "rotary_dim": 4,
        "vocab_size": 99,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
)

_HEADS = {
    "ForSequenceClassification": DECODER_HEADS["ForSequenceClassification"],
    "ForQuestionAnswering": DECODER_HEADS["ForQuestionAnswering"],
    "ForCausalLM": HeadRule(
        head_type="causal_lm",
        weights={"lm_head.weight": "weight", "lm_head.bias": "bias"},
        config={**ONE_LAYER, "layer_norm": False, "bias": True},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """GPT-J."""
    return [GPTJ]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for GPT-J."""
    return conversions(GPTJ, "GPTJ", _HEADS)
