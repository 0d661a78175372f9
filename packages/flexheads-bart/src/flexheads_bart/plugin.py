"""What this package registers: where the sites of BART and its kin are, and its static heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, ResidualSite, hookimpl
from flexheads.layouts import DECODER_LAYERS, ENCODER_HEADS, ENCODER_LAYERS, ONE_LAYER, conversions

# A norm stands behind each sum.
_NORMS_LAST: dict[str, Any] = {
    "attention": ResidualSite(
        output="self_attn.out_proj", residual="self_attn", norm="self_attn_layer_norm"
    ),
    "feed_forward": ResidualSite(output="fc2", residual="fc1", norm="final_layer_norm"),
}
_CROSS_LAST = ResidualSite(
    output="encoder_attn.out_proj", residual="encoder_attn", norm="encoder_attn_layer_norm"
)

BART = ArchitectureSpec(
    name="bart",
    model_types=("bart",),
    backbone="transformers.models.bart.modeling_bart:BartModel",
    embeddings="encoder.layernorm_embedding",
    layers=(
        replace(ENCODER_LAYERS, **_NORMS_LAST),
        replace(DECODER_LAYERS, **_NORMS_LAST, cross_attention=_CROSS_LAST),
    ),
    norms=("encoder.layernorm_embedding", "decoder.layernorm_embedding"),
    pooling="eos",
    shares_layers=True,
    adapterhub={"embeddings": "encoder"},
    tiny={
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
)

PLBART = replace(
    BART,
    name="plbart",
    model_types=("plbart",),
    backbone="transformers.models.plbart.modeling_plbart:PLBartModel",
    decoder_starts_with="last_token",
)

# Its norms come first.
MBART = replace(
    BART,
    name="mbart",
    model_types=("mbart",),
    backbone="transformers.models.mbart.modeling_mbart:MBartModel",
    layers=(ENCODER_LAYERS, DECODER_LAYERS),
    norms=(*BART.norms, "encoder.layer_norm", "decoder.layer_norm"),
    decoder_starts_with="last_token",
)

# The classes with the decoder alone (`...ForCausalLM`) are left out: flexible heads stand on both
# sides. Adapters work on them.
_HEADS = {
    "ForConditionalGeneration": HeadRule(
        head_type="seq2seq_lm",
        weights={"lm_head.weight": "weight"},
        config={**ONE_LAYER, "layer_norm": False},
        added_bias="final_logits_bias",
    ),
    "ForSequenceClassification": HeadRule(
        head_type="classification",
        weights={
            "classification_head.dense": "layers.0",
            "classification_head.out_proj": "layers.1",
        },
        config={"layers": 2, "activation_function": "tanh"},
    ),
    "ForQuestionAnswering": ENCODER_HEADS["ForQuestionAnswering"],
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """BART, mBART and PLBart."""
    return [BART, MBART, PLBART]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """The head classes with both sides; PLBart answers no questions."""
    unasked = {name: rule for name, rule in _HEADS.items() if name != "ForQuestionAnswering"}
    return [
        *conversions(BART, "Bart", _HEADS),
        *conversions(MBART, "MBart", _HEADS),
        *conversions(PLBART, "PLBart", unasked),
    ]
