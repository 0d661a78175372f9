"""What this package registers: where BEiT's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import ONE_LAYER, conversions

BEIT = ArchitectureSpec(
    name="beit",
    model_types=("beit",),
    backbone="transformers.models.beit.modeling_beit:BeitModel",
    embeddings="embeddings",
    layers=(
        LayerSpec(
            path=("encoder.layer", "layers"),
            # Both results are scaled by a bare parameter; behind that they share a module.
            attention=ResidualSite(output="drop_path", residual="layernorm_before"),
            feed_forward=ResidualSite(output="drop_path", residual="layernorm_after"),
            query=("attention.attention.query", "attention.q_proj"),
            key=("attention.attention.key", "attention.k_proj"),
            value=("attention.attention.value", "attention.v_proj"),
            attention_output=("attention.output.dense", "attention.o_proj"),
            mlp_in=("intermediate.dense", "mlp.fc1"),
            mlp_out=("output.dense", "mlp.fc2"),
            self_attention=("attention.attention", "attention"),
            norms=("layernorm_before", "layernorm_after"),
            adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
        ),
    ),
    # Which of them there is depends on how the model pools.
    norms=(("pooler.layernorm", "layernorm"),),
    inputs="pixels",
    pooling="pooler",
    pooler=True,
    fixed_positions_if=("use_relative_position_bias", "use_shared_relative_position_bias"),
    shares_layers=True,
    tiny={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "vocab_size": 99,
    },
)

# Left out: segmentation, whose head is a network of its own over several layers.
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
        head_type="masked_image_tokens",
        weights={"layernorm": "norm", "lm_head": "layers.0"},
        config={**ONE_LAYER, "dropout_prob": 0.0},
        config_from={"vocab_size": "vocab_size"},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """BEiT."""
    return [BEIT]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Image classification, and the visual tokens of masked images."""
    return conversions(BEIT, "Beit", _HEADS)
