"""What this package registers: where SmolLM3's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, hookimpl
from flexheads.layouts import DECODER_HEADS, GATED_LAYERS, TINY, conversions

# Models of SmolLM and SmolLM2 are LLaMA models, and belong to that package.
SMOLLM3 = ArchitectureSpec(
    name="smollm3",
    model_types=("smollm3",),
    backbone="transformers.models.smollm3.modeling_smollm3:SmolLM3Model",
    embeddings="embed_tokens",
    layers=(GATED_LAYERS,),
    norms=("norm",),
    pooling="last_token",
    shares_layers=True,
    prefixes=("transformer",),
    tiny={
        **TINY,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "no_rope_layers": [1, 0],
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """SmolLM3."""
    return [SMOLLM3]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for SmolLM3."""
    return conversions(SMOLLM3, "SmolLM3", DECODER_HEADS)
