"""What this package registers: where Swin's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import ONE_LAYER, conversions

SWIN = ArchitectureSpec(
    name="swin",
    model_types=("swin",),
    backbone="transformers.models.swin.modeling_swin:SwinModel",
    layers=(
        # Layers of a later stage are wider. Attention works in windows, to which prefixes and
        # prompts could not belong; its projections see windows as rows.
        LayerSpec(
            path="encoder.layers.*.blocks",
            folded=True,
            attention=ResidualSite(output="drop_path", residual="layernorm_before"),
            feed_forward=ResidualSite(output=("output", "mlp"), residual="layernorm_after"),
            query=("attention.self.query", "attention.q_proj"),
            key=("attention.self.key", "attention.k_proj"),
            value=("attention.self.value", "attention.v_proj"),
            attention_output=("attention.output.dense", "attention.o_proj"),
            mlp_in=("intermediate.dense", "mlp.fc1"),
            mlp_out=("output.dense", "mlp.fc2"),
            norms=("layernorm_before", "layernorm_after"),
            adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
        ),
    ),
    norms=("layernorm",),
    inputs="pixels",
    first_patch=0,
    pooling="pooler",
    pooler=True,
    shares_layers=True,
    tiny={
        "embed_dim": 32,
        "depths": [2, 2],
        "num_heads": [4, 8],
        "window_size": 2,
        "image_size": 32,
        "patch_size": 4,
    },
)

_HEADS = {
    "ForImageClassification": HeadRule(
        head_type="image_classification",
        weights={"classifier": "layers.0"},
        config={
            **ONE_LAYER,
            "use_pooler": True,
            "dropout_prob": 0.0,
        },
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
    """Swin."""
    return [SWIN]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Image classification, and masked images."""
    return conversions(SWIN, "Swin", _HEADS)
