"""What this package registers: where Whisper's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, hookimpl
from flexheads.layouts import DECODER_LAYERS, ENCODER_LAYERS, ONE_LAYER, conversions

WHISPER = ArchitectureSpec(
    name="whisper",
    model_types=("whisper",),
    backbone="transformers.models.whisper.modeling_whisper:WhisperModel",
    # No module gives what enters the first layer: it is the sum of convolutions and positions.
    embeddings="encoder.layers.0",
    embeddings_from="input",
    # The adapters library has invertible adapters where the encoder ends.
    late_embeddings="encoder.layer_norm",
    layers=(ENCODER_LAYERS, DECODER_LAYERS),
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
    "ForConditionalGeneration": HeadRule(
        head_type="seq2seq_lm",
        weights={"proj_out.weight": "weight"},
        config={**ONE_LAYER, "layer_norm": False, "bias": False},
    ),
    "ForAudioClassification": HeadRule(
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
    return conversions(WHISPER, "Whisper", _HEADS)
