"""What this package registers: where T5's and mT5's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import ONE_LAYER, conversions

_SELF_ATTENTION = ResidualSite(output="layer.0.dropout", residual="layer.0.layer_norm")

ENCODER = LayerSpec(
    path="encoder.block",
    side="encoder",
    attention=_SELF_ATTENTION,
    feed_forward=ResidualSite(output="layer.1.dropout", residual="layer.1.layer_norm"),
    query="layer.0.SelfAttention.q",
    key="layer.0.SelfAttention.k",
    value="layer.0.SelfAttention.v",
    attention_output="layer.0.SelfAttention.o",
    mlp_in=("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_1"),
    mlp_out="layer.1.DenseReluDense.wo",
    self_attention="layer.0.SelfAttention",
    norms=("layer.0.layer_norm", "layer.1.layer_norm"),
    adapterhub={"attention": "layer.0", "feed_forward": "layer.1"},
)

DECODER = LayerSpec(
    path="decoder.block",
    side="decoder",
    attention=_SELF_ATTENTION,
    cross_attention=ResidualSite(output="layer.1.dropout", residual="layer.1.layer_norm"),
    feed_forward=ResidualSite(output="layer.2.dropout", residual="layer.2.layer_norm"),
    query="layer.0.SelfAttention.q",
    key="layer.0.SelfAttention.k",
    value="layer.0.SelfAttention.v",
    attention_output="layer.0.SelfAttention.o",
    cross_query="layer.1.EncDecAttention.q",
    cross_key="layer.1.EncDecAttention.k",
    cross_value="layer.1.EncDecAttention.v",
    cross_attention_output="layer.1.EncDecAttention.o",
    mlp_in=("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wi_1"),
    mlp_out="layer.2.DenseReluDense.wo",
    self_attention="layer.0.SelfAttention",
    encoder_attention="layer.1.EncDecAttention",
    norms=("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
    adapterhub={"attention": "layer.0", "cross_attention": "layer.1", "feed_forward": "layer.2"},
)

T5 = ArchitectureSpec(
    name="t5",
    model_types=("t5",),
    backbone="transformers.models.t5.modeling_t5:T5Model",
    # The embedding module can be that of both sides; only the encoder's tokens are meant.
    embeddings="encoder.block.0",
    embeddings_from="input",
    layers=(ENCODER, DECODER),
    norms=("encoder.final_layer_norm", "decoder.final_layer_norm"),
    pooling="eos",
    scaled_if=("scale_decoder_outputs", "tie_word_embeddings"),
    shares_layers=True,
    adapterhub={"embeddings": "encoder"},
    tiny={
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "vocab_size": 99,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    },
)

# Its feed-forward network is gated. Its own class with a language-model head scales nothing.
MT5 = replace(
    T5,
    name="mt5",
    model_types=("mt5",),
    backbone="transformers.models.mt5.modeling_mt5:MT5Model",
    scaled_if=None,
)

_HEADS = {
    "ForConditionalGeneration": HeadRule(
        head_type="seq2seq_lm",
        weights={"lm_head.weight": "weight"},
        config={**ONE_LAYER, "layer_norm": False, "bias": False},
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
        config={**ONE_LAYER, "scaled": False, "dropout_prob": 0.0},
        output="start_logits",
    ),
    "ForTokenClassification": HeadRule(
        head_type="tagging",
        weights={"classifier": "layers.0"},
        config={**ONE_LAYER, "side": "encoder"},
        config_from={"dropout_prob": "classifier_dropout"},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """T5 and mT5."""
    return [T5, MT5]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for them."""
    return [*conversions(T5, "T5", _HEADS), *conversions(MT5, "MT5", _HEADS)]
