"""What this package registers: where ModernBERT's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import (
    ArchitectureSpec,
    FusedBlock,
    HeadConversion,
    LayerSpec,
    ResidualSite,
    hookimpl,
)

MODERNBERT = ArchitectureSpec(
    name="modernbert",
    model_types=("modernbert",),
    backbone="transformers.models.modernbert.modeling_modernbert:ModernBertModel",
    embeddings="embeddings",
    layers=(
        LayerSpec(
            path="layers",
            attention=ResidualSite(output="attn.out_drop", residual="attn_norm"),
            feed_forward=ResidualSite(output="mlp", residual="mlp_norm"),
            query="attn.Wqkv",
            key="attn.Wqkv",
            value="attn.Wqkv",
            fused={
                "query": FusedBlock(0, 3),
                "key": FusedBlock(1, 3),
                "value": FusedBlock(2, 3),
            },
            attention_output="attn.Wo",
            mlp_in="mlp.Wi",
            mlp_out="mlp.Wo",
            self_attention="attn",
            # The attention's norm is left out: the first layer has none.
            norms=("mlp_norm",),
            adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
        ),
    ),
    norms=("embeddings.norm", "final_norm"),
    pooling="first_token",
    prompts="tokens",
    tiny={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
)


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """ModernBERT."""
    return [MODERNBERT]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """None yet: all of its classes have a norm without bias in their heads."""
    return []
