"""What this package registers: where OLMo's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexheads import ArchitectureSpec, HeadConversion, ResidualSite, hookimpl
from flexheads.layouts import DECODER_HEADS, GATED_LAYERS, TINY, conversions

# Its norms have no weights, so none are named.
_LAYERS = replace(GATED_LAYERS, norms=())

# The norms stand behind the sub-layers, on their results alone.
_REORDERED = replace(
    _LAYERS,
    attention=ResidualSite(output="post_attention_layernorm", residual="self_attn"),
    feed_forward=ResidualSite(output="post_feedforward_layernorm", residual="mlp"),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)

OLMO = ArchitectureSpec(
    name="olmo",
    model_types=("olmo",),
    backbone="transformers.models.olmo.modeling_olmo:OlmoModel",
    embeddings="embed_tokens",
    layers=(_LAYERS,),
    pooling="last_token",
    shares_layers=True,
    tiny={
        **TINY,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
OLMO2 = replace(
    OLMO,
    name="olmo2",
    model_types=("olmo2",),
    backbone="transformers.models.olmo2.modeling_olmo2:Olmo2Model",
    layers=(_REORDERED,),
    norms=("norm",),
)

# The classes that classify are younger than the oldest release of transformers that this serves.
_HEADS = {name: DECODER_HEADS[name] for name in ("ForSequenceClassification", "ForCausalLM")}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """OLMo, and OLMo 2."""
    return [OLMO, OLMO2]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for them."""
    return [*conversions(OLMO, "Olmo", _HEADS), *conversions(OLMO2, "Olmo2", _HEADS)]
