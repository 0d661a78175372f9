"""What this package registers: where the sites of CLIP's towers are, alone and side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexheads import ArchitectureSpec, LayerSpec, ResidualSite, hookimpl


def _tower(name: str) -> LayerSpec:
    """The layers of one tower; a tower that is a model of its own has lost the outer name."""
    return LayerSpec(
        path=(f"{name}_model.encoder.layers", "encoder.layers"),
        attention=ResidualSite(output="self_attn.out_proj", residual="layer_norm1"),
        feed_forward=ResidualSite(output="mlp", residual="layer_norm2"),
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        attention_output="self_attn.out_proj",
        mlp_in="mlp.fc1",
        mlp_out="mlp.fc2",
        self_attention="self_attn",
        norms=("layer_norm1", "layer_norm2"),
        adapterhub={
            "attention": "attention_adapters",
            "feed_forward": "output_adapters",
            "self_attention.prefix": f"clip_{name}_model_self_prefix",
        },
    )


_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "projection_dim": 16,
}
_TEXT_SIZES = {
    **_SIZES,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 98,
    "pad_token_id": 0,
}
_VISION_SIZES = {**_SIZES, "image_size": 32, "patch_size": 8}

TEXT = ArchitectureSpec(
    name="clip_text_model",
    model_types=("clip_text_model",),
    backbone="transformers.models.clip.modeling_clip:CLIPTextModel",
    embeddings=("text_model.embeddings", "embeddings"),
    layers=(_tower("text"),),
    norms=(("text_model.final_layer_norm", "final_layer_norm"),),
    pooling="pooler",
    pooler=True,
    fixed_positions_if=("eos_token_id",),  # at which the model pools
    adapterhub={"embeddings": "text_model"},
    tiny=_TEXT_SIZES,
)

VISION = ArchitectureSpec(
    name="clip_vision_model",
    model_types=("clip_vision_model",),
    backbone="transformers.models.clip.modeling_clip:CLIPVisionModel",
    embeddings=("vision_model.pre_layrnorm", "pre_layrnorm"),
    layers=(_tower("vision"),),
    norms=(
        ("vision_model.pre_layrnorm", "pre_layrnorm"),
        ("vision_model.post_layernorm", "post_layernorm"),
    ),
    inputs="pixels",
    pooling="pooler",
    pooler=True,
    adapterhub={"embeddings": "vision_model"},
    tiny=_VISION_SIZES,
)

# Invertible adapters act on the tokens alone.
CLIP = ArchitectureSpec(
    name="clip",
    model_types=("clip",),
    backbone="transformers.models.clip.modeling_clip:CLIPModel",
    embeddings="text_model.embeddings",
    layers=tuple(
        replace(_tower(name), path=f"{name}_model.encoder.layers", config=f"{name}_config")
        for name in ("text", "vision")
    ),
    norms=(
        "text_model.final_layer_norm",
        "vision_model.pre_layrnorm",
        "vision_model.post_layernorm",
    ),
    inputs="tokens_and_pixels",
    pooling=None,
    adapterhub={"embeddings": "text_model"},
    tiny={"text_config": _TEXT_SIZES, "vision_config": _VISION_SIZES, "projection_dim": 16},
)


# The static classes have no head that a flexible one could equal: projections into the common
# space, and a classifier on the mean of the patches. Adapters work on all of them.
@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """CLIP and its two towers."""
    return [TEXT, VISION, CLIP]
