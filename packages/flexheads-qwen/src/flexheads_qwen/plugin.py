"""What this package registers: where Qwen's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, hookimpl
from flexheads.layouts import DECODER_HEADS, GATED_LAYERS, TINY, conversions


def _qwen(name: str, prefix: str, **tiny: int) -> ArchitectureSpec:
    """One generation; they differ in what happens between a projection and the attention."""
    return ArchitectureSpec(
        name=name,
        model_types=(name,),
        backbone=f"transformers.models.{name}.modeling_{name}:{prefix}Model",
        embeddings="embed_tokens",
        layers=(GATED_LAYERS,),
        norms=("norm",),
        pooling="last_token",
        shares_layers=True,
        prefixes=("transformer",),
        tiny={**TINY, "num_key_value_heads": 2, "pad_token_id": 0, **tiny},
    )


QWEN2 = _qwen("qwen2", "Qwen2")
# Heads of another size than the width gives, as the small models of this generation have.
QWEN3 = _qwen("qwen3", "Qwen3", head_dim=16)


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """Qwen2, which Qwen2.5 is built as too, and Qwen3."""
    return [QWEN2, QWEN3]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for them."""
    return [
        *conversions(QWEN2, "Qwen2", DECODER_HEADS),
        *conversions(QWEN3, "Qwen3", DECODER_HEADS),
    ]
