"""What this package registers: where Whisper's sites are, and how its static heads convert."""

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
    attention=ResidualSite(output="self_attn.out_proj", residual="self_attn_layer_norm"),
    feed_forward=ResidualSite(output="fc2", residual="final_layer_norm"),
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
        output="encoder_attn.out_proj", residual="encoder_attn_layer_norm"
    ),
    cross_query="encoder_attn.q_proj",
    cross_key="encoder_attn.k_proj",
    cross_value="encoder_attn.v_proj",
    cross_attention_output="encoder_attn.out_proj",
    encoder_attention="encoder_attn",
    norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    adapterhub={**_ADAPTERHUB, "cross_attention": "cross_attention_adapters"},
)

WHISPER = ArchitectureSpec(
    name="whisper",
    model_types=("whisper",),
    backbone="transformers.models.whisper.modeling_whisper:WhisperModel",
    # No module gives what enters the first layer: it is the sum of convolutions and positions.
    embeddings="encoder.layers.0",
    embeddings_from="input",
    # The adapters library has invertible adapters where the encoder ends.
    late_embeddings="encoder.layer_norm",
    layers=(ENCODER, DECODER),
    norms=("encoder.layer_norm", "decoder.layer_norm"),
    inputs="features",
    pooling="last_token",
    fixed_positions_if=("max_source_positions",),
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
        "num_mel_bins": 8,
        "classifier_proj_size": 24,
        "max_source_positions": 16,
        "max_target_positions": 64,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
)

# Left out: the decoder alone (`ForCausalLM`), which has no encoder of its own. Adapters work on it.
_HEADS = {
    "WhisperForConditionalGeneration": HeadRule(
        head_type="seq2seq_lm",
        weights={"proj_out.weight": "weight"},
        config={"layers": 1, "activation_function": None, "layer_norm": False, "bias": False},
    ),
    "WhisperForAudioClassification": HeadRule(
        head_type="audio_classification",
        weights={"projector": "layers.0", "classifier": "layers.1"},
        config={
            "layers": 2,
            "activation_function": None,
            "dropout_prob": 0.0,
            "side": "encoder",
        },
        config_from={"projection_size": "classifier_proj_size"},
        mixed_by="layer_weights",
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """Whisper."""
    return [WHISPER]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """The class that writes what it hears, and the one that says what it is."""
    return [
        HeadConversion(architecture=WHISPER.name, static_class=name, heads=(rule,))
        for name, rule in _HEADS.items()
    ]
