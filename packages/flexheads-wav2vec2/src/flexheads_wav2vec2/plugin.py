"""What this package registers: where the sites of Wav2Vec2 and its kin are, and static heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import ONE_LAYER, conversions

# In small models the norms come last, in large ones first: there they are called stable.
NORMS_LAST = LayerSpec(
    path="encoder.layers",
    when={"do_stable_layer_norm": False},
    attention=ResidualSite(output="dropout", residual="attention", norm="layer_norm"),
    feed_forward=ResidualSite(
        output="feed_forward.output_dropout", residual="feed_forward", norm="final_layer_norm"
    ),
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    attention_output="attention.out_proj",
    mlp_in="feed_forward.intermediate_dense",
    mlp_out="feed_forward.output_dense",
    self_attention="attention",
    norms=("layer_norm", "final_layer_norm"),
    adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
)

NORMS_FIRST = replace(
    NORMS_LAST,
    when={"do_stable_layer_norm": True},
    attention=ResidualSite(output="dropout", residual="layer_norm"),
    feed_forward=ResidualSite(output="feed_forward.output_dropout", residual="final_layer_norm"),
)

WAV2VEC2 = ArchitectureSpec(
    name="wav2vec2",
    model_types=("wav2vec2",),
    backbone="transformers.models.wav2vec2.modeling_wav2vec2:Wav2Vec2Model",
    embeddings="encoder.dropout",
    layers=(NORMS_LAST, NORMS_FIRST),
    norms=("encoder.layer_norm",),
    inputs="waveform",
    pooling="mean",
    fixed_positions_if=("conv_dim",),  # masks are made of samples, where no prompt has any
    shares_layers=True,
    tiny={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 99,
        "conv_dim": (16, 16),
        "conv_stride": (5, 4),
        "conv_kernel": (10, 8),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "layerdrop": 0.0,
        "mask_time_prob": 0.0,
        "classifier_proj_size": 24,
        "tdnn_dim": (24, 40),
        "tdnn_kernel": (3, 2),
        "tdnn_dilation": (1, 2),
        "xvector_output_dim": 20,
        "do_stable_layer_norm": False,
    },
)

HUBERT = replace(
    WAV2VEC2,
    name="hubert",
    model_types=("hubert",),
    backbone="transformers.models.hubert.modeling_hubert:HubertModel",
)

# WavLM hands the weights of its attention to torch, which calls no module.
_NO_ATTENTION: dict[str, Any] = dict.fromkeys(
    ("query", "key", "value", "attention_output", "self_attention")
)

WAVLM = replace(
    WAV2VEC2,
    name="wavlm",
    model_types=("wavlm",),
    backbone="transformers.models.wavlm.modeling_wavlm:WavLMModel",
    layers=tuple(replace(layers, **_NO_ATTENTION) for layers in WAV2VEC2.layers),
    shares_layers=False,  # they hand on a bias with the rows and heads in one dimension
)

# Left out: pre-training, whose targets a quantiser of the class makes. Adapters work on it.
_HEADS = {
    "ForCTC": HeadRule(
        head_type="ctc",
        weights={"lm_head": "layers.0"},
        config=ONE_LAYER,
        config_from={
            "vocab_size": "vocab_size",
            "blank": "pad_token_id",
            "reduction": "ctc_loss_reduction",
            "zero_infinity": "ctc_zero_infinity",
            "dropout_prob": "final_dropout",
        },
    ),
    "ForSequenceClassification": HeadRule(
        head_type="audio_classification",
        weights={"projector": "layers.0", "classifier": "layers.1"},
        config={"layers": 2, "activation_function": None, "dropout_prob": 0.0},
        config_from={"projection_size": "classifier_proj_size"},
        mixed_by="layer_weights",
    ),
    "ForAudioFrameClassification": HeadRule(
        head_type="audio_frame_classification",
        weights={"classifier": "layers.0"},
        config={**ONE_LAYER, "dropout_prob": 0.0},
        mixed_by="layer_weights",
    ),
    "ForXVector": HeadRule(
        head_type="xvector",
        weights={
            "projector": "projector",
            "tdnn": "tdnn",
            "feature_extractor": "embedding",
            "classifier": "output",
            "objective.weight": "speakers",
        },
        config_from={
            "sizes": "tdnn_dim",
            "kernels": "tdnn_kernel",
            "dilations": "tdnn_dilation",
            "embedding_size": "xvector_output_dim",
        },
        mixed_by="layer_weights",
    ),
}
_OF_HUBERT = {name: _HEADS[name] for name in ("ForCTC", "ForSequenceClassification")}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """Wav2Vec2, HuBERT and WavLM."""
    return [WAV2VEC2, HUBERT, WAVLM]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Text, classes of sounds and of frames, and voices."""
    return [
        *conversions(WAV2VEC2, "Wav2Vec2", _HEADS),
        *conversions(HUBERT, "Hubert", _OF_HUBERT),
        *conversions(WAVLM, "WavLM", _HEADS),
    ]
