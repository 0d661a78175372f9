"""What this package registers: where LLaMA's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexheads import ArchitectureSpec, HeadConversion, hookimpl
from flexheads.layouts import DECODER_HEADS, GATED_LAYERS, TINY, conversions

_LAYERS = replace(
    GATED_LAYERS,
    adapterhub={
        **GATED_LAYERS.adapterhub,
        # Files of that library call each by the other's name.
        "mlp_in": "mlp.down_proj",
        "mlp_out": "mlp.up_proj",
    },
)

LLAMA = ArchitectureSpec(
    name="llama",
    model_types=("llama",),
    backbone="transformers.models.llama.modeling_llama:LlamaModel",
    embeddings="embed_tokens",
    layers=(_LAYERS,),
    norms=("norm",),
    pooling="last_token",
    shares_layers=True,
    prefixes=("transformer",),
    tiny={**TINY, "num_key_value_heads": 2, "pad_token_id": 0},
)


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """LLaMA."""
    return [LLAMA]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for LLaMA."""
    return conversions(LLAMA, "Llama", DECODER_HEADS)
