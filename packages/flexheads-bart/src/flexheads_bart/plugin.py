"""What this package registers: where the sites of BART and its kin are, and its static heads."""

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

_ADAPTERHUB = {"attention": "attention_adapters", "feed_forward": "output_adapters"}

ENCODER = LayerSpec(
    path="encoder.layers",
    side="encoder",
    attention=ResidualSite(
        output="self_attn.out_proj", residual="self_attn", norm="self_attn_layer_norm"
    ),
    feed_forward=ResidualSite(output="fc2", residual="fc1", norm="final_layer_norm"),
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn.out_proj",
    mlp_in="fc1",
    mlp_out="fc2",
    self_attention="self_attn",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    adapterhub=_ADAPTERHUB,
)

DECODER = replace(
    ENCODER,
    path="decoder.layers",
    side="decoder",
    cross_attention=ResidualSite(
        output="encoder_attn.out_proj", residual="encoder_attn", norm="encoder_attn_layer_norm"
    ),
    cross_query="encoder_attn.q_proj",
    cross_key="encoder_attn.k_proj",
    cross_value="encoder_attn.v_proj",
    cross_attention_output="encoder_attn.out_proj",
    encoder_attention="encoder_attn",
    norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    adapterhub={**_ADAPTERHUB, "cross_attention": "cross_attention_adapters"},
)

BART = ArchitectureSpec(
    name="bart",
    model_types=("bart",),
    backbone="transformers.models.bart.modeling_bart:BartModel",
    embeddings="encoder.layernorm_embedding",
    layers=(ENCODER, DECODER),
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

# In mBART the norms come first.
_NORMS_FIRST = {
    "attention": ResidualSite(output="self_attn.out_proj", residual="self_attn_layer_norm"),
    "feed_forward": ResidualSite(output="fc2", residual="final_layer_norm"),
}
_CROSS_FIRST = ResidualSite(output="encoder_attn.out_proj", residual="encoder_attn_layer_norm")

MBART = replace(
    BART,
    name="mbart",
    model_types=("mbart",),
    backbone="transformers.models.mbart.modeling_mbart:MBartModel",
    layers=(
        replace(ENCODER, **_NORMS_FIRST),
        replace(DECODER, **_NORMS_FIRST, cross_attention=_CROSS_FIRST),
    ),
    norms=(*BART.norms, "encoder.layer_norm", "decoder.layer_norm"),
    decoder_starts_with="last_token",
)

# The classes with the decoder alone (`...ForCausalLM`) are left out: flexible heads stand on both
# sides. Adapters work on them.
_HEADS = {
    "ForConditionalGeneration": HeadRule(
        head_type="seq2seq_lm",
        weights={"lm_head.weight": "weight"},
        config={"layers": 1, "activation_function": None, "layer_norm": False},
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
    "ForQuestionAnswering": HeadRule(
        head_type="question_answering",
        weights={"qa_outputs": "layers.0"},
        config={"layers": 1, "activation_function": None, "dropout_prob": 0.0},
        output="start_logits",
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """BART, mBART and PLBart."""
    return [BART, MBART, PLBART]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """The head classes with both sides; PLBart answers no questions."""
    return [
        HeadConversion(architecture=spec.name, static_class=prefix + ending, heads=(rule,))
        for spec, prefix in ((BART, "Bart"), (MBART, "MBart"), (PLBART, "PLBart"))
        for ending, rule in _HEADS.items()
        if (prefix, ending) != ("PLBart", "ForQuestionAnswering")
    ]
