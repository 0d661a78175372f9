"""What this package registers: where the sites of CLIP's towers are, alone and side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexheads import (
    ArchitectureSpec,
    HeadConversion,
    HeadRule,
    LayerSpec,
    ResidualSite,
    hookimpl,
)


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
    shares_layers=True,
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


def _projection(weights: str, output: str) -> HeadRule:
    """The projection of one tower into the common space."""
    return HeadRule(
        head_type="embedding",
        weights={weights: "layers.0"},
        config={
            "layers": 1,
            "activation_function": None,
            "pooling": "pooler",
            "bias": False,
            "normalise": False,
            "dropout_prob": 0.0,
        },
        config_from={"embedding_size": "projection_dim"},
        output=output,
    )


# Its class has a configuration of both towers, and one of them.
_CLASSIFICATION = HeadRule(
    head_type="image_classification",
    weights={"classifier": "layers.0"},
    config={
        "layers": 1,
        "activation_function": None,
        "pooling": "patch_mean",
        "dropout_prob": 0.0,
    },
)

_HEADS = {
    "CLIPTextModelWithProjection": (TEXT, _projection("text_projection", "text_embeds")),
    "CLIPVisionModelWithProjection": (VISION, _projection("visual_projection", "image_embeds")),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """CLIP and its two towers."""
    return [TEXT, VISION, CLIP]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """The projections into the common space, and image classification."""
    projections = [
        HeadConversion(architecture=spec.name, static_class=name, heads=(rule,))
        for name, (spec, rule) in _HEADS.items()
    ]
    classification = HeadConversion(
        architecture=VISION.name,
        static_class="CLIPForImageClassification",
        heads=(_CLASSIFICATION,),
        model_type="clip",
    )
    return [*projections, classification]
