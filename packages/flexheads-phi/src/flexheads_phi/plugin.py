"""What this package registers: where Phi's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import (
    ArchitectureSpec,
    FusedBlock,
    HeadConversion,
    HeadRule,
    LayerSpec,
    ResidualSite,
    hookimpl,
)
from flexheads.layouts import DECODER_HEADS, ONE_LAYER, TINY, conversions, thirds

PHI = ArchitectureSpec(
    name="phi",
    model_types=("phi",),
    backbone="transformers.models.phi.modeling_phi:PhiModel",
    embeddings="embed_tokens",
    layers=(
        LayerSpec(
            path="layers",
            attention=ResidualSite(output="self_attn.dense", residual="input_layernorm"),
            # Both sub-layers read the same norm; their sum and the layer's input make its result.
            feed_forward=ResidualSite(
                output="mlp", residual="input_layernorm", beside="self_attn.dense", alone=True
            ),
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            attention_output="self_attn.dense",
            mlp_in="mlp.fc1",
            mlp_out="mlp.fc2",
            self_attention="self_attn",
            norms=("input_layernorm",),
            adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
        ),
    ),
    norms=("final_layernorm",),
    pooling="last_token",
    shares_layers=True,
    tiny={**TINY, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.2},
)

_QKV = ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")

PHI3 = ArchitectureSpec(
    name="phi3",
    model_types=("phi3",),
    backbone="transformers.models.phi3.modeling_phi3:Phi3Model",
    embeddings="embed_tokens",
    layers=(
        LayerSpec(
            path="layers",
            attention=ResidualSite(output="resid_attn_dropout", residual="input_layernorm"),
            feed_forward=ResidualSite(
                output="resid_mlp_dropout", residual="post_attention_layernorm"
            ),
            query="self_attn.qkv_proj",
            key="self_attn.qkv_proj",
            value="self_attn.qkv_proj",
            attention_output="self_attn.o_proj",
            mlp_in="mlp.gate_up_proj",
            mlp_out="mlp.down_proj",
            fused={
                **thirds(shares=_QKV),
                "mlp_in": FusedBlock(1, 2),  # behind the gate
            },
            self_attention="self_attn",
            norms=("input_layernorm", "post_attention_layernorm"),
            adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
        ),
    ),
    norms=("norm",),
    pooling="last_token",
    shares_layers=True,
    tiny={
        **TINY,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sliding_window": 4,
    },
)

# No class of Phi answers questions.
_HEADS = {name: rule for name, rule in DECODER_HEADS.items() if name != "ForQuestionAnswering"}
_WITH_BIAS = HeadRule(
    head_type="causal_lm",
    weights={"lm_head.weight": "weight", "lm_head.bias": "bias"},
    config={**ONE_LAYER, "layer_norm": False, "bias": True},
)


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """Phi (1, 1.5 and 2), and Phi-3, which Phi-4 is built as too."""
    return [PHI, PHI3]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for them."""
    return [
        *conversions(PHI, "Phi", {**_HEADS, "ForCausalLM": _WITH_BIAS}),
        *conversions(PHI3, "Phi3", _HEADS),
    ]
