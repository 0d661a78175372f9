"""What this package registers: where ViT's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import ONE_LAYER, conversions

VIT = ArchitectureSpec(
    name="vit",
    model_types=("vit",),
    backbone="transformers.models.vit.modeling_vit:ViTModel",
    embeddings="embeddings",
    layers=(
        LayerSpec(
            path=("encoder.layer", "layers"),
            attention=ResidualSite(
                output=("attention.output.dropout", "attention.o_proj"), residual="layernorm_before"
            ),
            feed_forward=ResidualSite(output=("output.dropout", "mlp"), residual="layernorm_after"),
            query=("attention.attention.query", "attention.q_proj"),
            key=("attention.attention.key", "attention.k_proj"),
            value=("attention.attention.value", "attention.v_proj"),
            attention_output=("attention.output.dense", "attention.o_proj"),
            mlp_in=("intermediate.dense", "mlp.fc1"),
            mlp_out=("output.dense", "mlp.fc2"),
            self_attention=("attention.attention", "attention"),
            norms=("layernorm_before", "layernorm_after"),
            adapterhub={
                "attention": "attention_adapters",
                "feed_forward": "output.output_adapters",
            },
        ),
    ),
    norms=("layernorm",),
    inputs="pixels",
    pooling="first_token",
    pooler=True,
    shares_layers=True,
    tiny={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    },
)

_HEADS = {
    "ForImageClassification": HeadRule(
        head_type="image_classification",
        weights={"classifier": "layers.0"},
        config={**ONE_LAYER, "dropout_prob": 0.0},
    ),
    "ForMaskedImageModeling": HeadRule(
        head_type="masked_image_modeling",
        weights={"decoder.0": "decoder"},
        config_from={"stride": "encoder_stride", "num_channels": "num_channels"},
        output="reconstruction",
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """ViT."""
    return [VIT]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Image classification, and masked images."""
    return conversions(VIT, "ViT", _HEADS)
