"""What this package registers: where Gemma's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexheads import ArchitectureSpec, HeadConversion, ResidualSite, hookimpl
from flexheads.layouts import DECODER_HEADS, GATED_LAYERS, TINY, conversions

# The first layer's input: whether the embeddings are scaled inside their module or behind it
# depends on the release of transformers.
_EMBEDDINGS = "layers.0"

# Each sub-layer stands between two norms; its result is what comes out of the second.
_SANDWICH = replace(
    GATED_LAYERS,
    attention=ResidualSite(output="post_attention_layernorm", residual="input_layernorm"),
    feed_forward=ResidualSite(
        output="post_feedforward_layernorm", residual="pre_feedforward_layernorm"
    ),
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
)

_TINY = {**TINY, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_SLIDING = {
    **_TINY,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}

GEMMA = ArchitectureSpec(
    name="gemma",
    model_types=("gemma",),
    backbone="transformers.models.gemma.modeling_gemma:GemmaModel",
    embeddings=_EMBEDDINGS,
    embeddings_from="input",
    layers=(GATED_LAYERS,),
    norms=("norm",),
    pooling="last_token",
    # With tied embeddings so scaled, random weights write one token again and again.
    shares_layers=True,
    tiny={**_TINY, "tie_word_embeddings": False},
)
GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    model_types=("gemma2",),
    backbone="transformers.models.gemma2.modeling_gemma2:Gemma2Model",
    layers=(_SANDWICH,),
    tiny=_SLIDING,
)
GEMMA3 = replace(
    GEMMA2,
    name="gemma3_text",
    model_types=("gemma3_text",),
    backbone="transformers.models.gemma3.modeling_gemma3:Gemma3TextModel",
    prefixes=("model",),
)

_LM = DECODER_HEADS["ForCausalLM"]
_CAPPED_LM = replace(_LM, config_from={"softcap": "final_logit_softcapping"})
_CLASSES = {
    "ForSequenceClassification": DECODER_HEADS["ForSequenceClassification"],
    "ForTokenClassification": DECODER_HEADS["ForTokenClassification"],
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """Gemma, Gemma 2, and Gemma 3 for text."""
    return [GEMMA, GEMMA2, GEMMA3]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for them."""
    # The classes of Gemma 3 that read images beside text are left out.
    return [
        *conversions(GEMMA, "Gemma", {**_CLASSES, "ForCausalLM": _LM}),
        *conversions(GEMMA2, "Gemma2", {**_CLASSES, "ForCausalLM": _CAPPED_LM}),
        *conversions(
            GEMMA3,
            "Gemma3",
            {
                "TextForSequenceClassification": _CLASSES["ForSequenceClassification"],
                "ForCausalLM": _CAPPED_LM,
            },
        ),
    ]
