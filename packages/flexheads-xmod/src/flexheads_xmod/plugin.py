"""What this package registers: where X-MOD's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexheads import ArchitectureSpec, HeadConversion, ResidualSite, hookimpl
from flexheads.layouts import ENCODER_HEADS, NORM_LAST_LAYERS, TINY, conversions

# The last norm is left out: only models whose norms come first have it.
XMOD = ArchitectureSpec(
    name="xmod",
    model_types=("xmod",),
    backbone="transformers.models.xmod.modeling_xmod:XmodModel",
    embeddings="embeddings",
    layers=(
        replace(
            NORM_LAST_LAYERS,
            attention=ResidualSite(
                output="attention.output.dropout",
                residual="attention",
                norm="attention.output.LayerNorm",
                norm_unless="pre_norm",
            ),
            # The language adapters are inside of the sub-layer, behind its residual.
            feed_forward=ResidualSite(
                output="output",
                residual="attention",
                residual_from="output",
                added=True,
                norm="output.LayerNorm",
                norm_unless="pre_norm",
            ),
        ),
    ),
    norms=("embeddings.LayerNorm",),
    pooling="first_token",
    pooler=True,
    tiny={**TINY, "pad_token_id": 1, "languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
)


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """X-MOD."""
    return [XMOD]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for X-MOD."""
    return conversions(XMOD, "Xmod", ENCODER_HEADS)
