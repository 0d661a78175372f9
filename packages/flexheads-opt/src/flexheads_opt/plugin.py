"""What this package registers: where OPT's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexheads import ArchitectureSpec, HeadConversion, hookimpl
from flexheads.layouts import DECODER_HEADS, ENCODER_LAYERS, conversions

OPT = ArchitectureSpec(
    name="opt",
    model_types=("opt",),
    backbone="transformers.models.opt.modeling_opt:OPTModel",
    embeddings="decoder.embed_tokens",
    entry="decoder",
    layers=(
        replace(
            ENCODER_LAYERS,
            path="decoder.layers",
            side=None,
            folded=True,  # the feed-forward network
        ),
    ),
    norms=("decoder.final_layer_norm",),
    pooling="last_token",
    shares_layers=True,
    # The one with 350 million parameters normalises behind each sub-layer, and has no last norm.
    requires={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    tiny={
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
)

_HEADS = {name: rule for name, rule in DECODER_HEADS.items() if name != "ForTokenClassification"}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """OPT."""
    return [OPT]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for OPT."""
    return conversions(OPT, "OPT", _HEADS)
