"""What this package registers: where MPNet's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import ENCODER_HEADS, TINY, conversions

MPNET = ArchitectureSpec(
    name="mpnet",
    model_types=("mpnet",),
    backbone="transformers.models.mpnet.modeling_mpnet:MPNetModel",
    embeddings="embeddings",
    layers=(
        LayerSpec(
            path="encoder.layer",
            attention=ResidualSite(
                output="attention.dropout", residual="attention", norm="attention.LayerNorm"
            ),
            feed_forward=ResidualSite(
                output="output.dropout", residual="intermediate", norm="output.LayerNorm"
            ),
            query="attention.attn.q",
            key="attention.attn.k",
            value="attention.attn.v",
            attention_output="attention.attn.o",
            mlp_in="intermediate.dense",
            mlp_out="output.dense",
            self_attention="attention.attn",
            norms=("attention.LayerNorm", "output.LayerNorm"),
            adapterhub={"attention": "attention", "feed_forward": "output"},
        ),
    ),
    norms=("embeddings.LayerNorm",),
    pooling="first_token",
    pooler=True,
    shares_layers=True,
    tiny=TINY,
)

_HEADS = {name: rule for name, rule in ENCODER_HEADS.items() if name != "ForCausalLM"}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """MPNet."""
    return [MPNET]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for MPNet."""
    return conversions(MPNET, "MPNet", _HEADS)
