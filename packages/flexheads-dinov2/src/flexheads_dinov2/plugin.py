"""What this package registers: where DINOv2's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import ONE_LAYER, conversions

DINOV2 = ArchitectureSpec(
    name="dinov2",
    model_types=("dinov2",),
    backbone="transformers.models.dinov2.modeling_dinov2:Dinov2Model",
    embeddings="embeddings",
    layers=(
        LayerSpec(
            path="encoder.layer",
            # Behind the scale of each sub-layer both share a module.
            attention=ResidualSite(output="drop_path", residual="norm1"),
            feed_forward=ResidualSite(output="drop_path", residual="norm2"),
            query=("attention.attention.query", "attention.q_proj"),
            key=("attention.attention.key", "attention.k_proj"),
            value=("attention.attention.value", "attention.v_proj"),
            attention_output=("attention.output.dense", "attention.o_proj"),
            mlp_in=("mlp.fc1", "mlp.weights_in", "mlp.up_proj"),
            mlp_out=("mlp.fc2", "mlp.weights_out", "mlp.down_proj"),
            self_attention=("attention.attention", "attention"),
            norms=("norm1", "norm2"),
            adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
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
        "mlp_ratio": 2,
        "image_size": 32,
        "patch_size": 8,
    },
)

REGISTERS = replace(
    DINOV2,
    name="dinov2_with_registers",
    model_types=("dinov2_with_registers",),
    backbone=(
        "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
        ":Dinov2WithRegistersModel"
    ),
)

_CLASSIFICATION = HeadRule(
    head_type="image_classification",
    weights={"classifier": "layers.0"},
    config={
        **ONE_LAYER,
        "pooling": "first_token_and_patch_mean",
        "dropout_prob": 0.0,
    },
)


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """DINOv2, and its version with registers."""
    return [DINOV2, REGISTERS]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Image classification, by the first token beside the mean of the others."""
    heads = {"ForImageClassification": _CLASSIFICATION}
    return [
        *conversions(DINOV2, "Dinov2", heads),
        *conversions(REGISTERS, "Dinov2WithRegisters", heads),
    ]
