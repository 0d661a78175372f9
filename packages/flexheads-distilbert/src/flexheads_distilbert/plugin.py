"""What this package registers: where DistilBERT's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import ONE_LAYER, conversions

DISTILBERT = ArchitectureSpec(
    name="distilbert",
    model_types=("distilbert",),
    backbone="transformers.models.distilbert.modeling_distilbert:DistilBertModel",
    embeddings="embeddings",
    layers=(
        LayerSpec(
            path="transformer.layer",
            attention=ResidualSite(
                output="attention.out_lin", residual="attention.q_lin", norm="sa_layer_norm"
            ),
            feed_forward=ResidualSite(output="ffn", residual="ffn", norm="output_layer_norm"),
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            attention_output="attention.out_lin",
            mlp_in="ffn.lin1",
            mlp_out="ffn.lin2",
            self_attention="attention",
            norms=("sa_layer_norm", "output_layer_norm"),
            adapterhub={
                "attention": "attention_adapters",
                "feed_forward": "output_adapters",
                "self_attention.prefix": "self",
            },
        ),
    ),
    norms=("embeddings.LayerNorm",),
    pooling="first_token",
    shares_layers=True,
    tiny={
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
    },
)

_TWO_LAYERS = {"layers": 2, "activation_function": "relu", "use_pooler": False}
_TWO_LAYERS_WEIGHTS = {"pre_classifier": "layers.0", "classifier": "layers.1"}

_HEADS = {
    "ForSequenceClassification": HeadRule(
        head_type="classification",
        weights=_TWO_LAYERS_WEIGHTS,
        config=_TWO_LAYERS,
        config_from={"dropout_prob": "seq_classif_dropout"},
    ),
    "ForMultipleChoice": HeadRule(
        head_type="multiple_choice",
        weights=_TWO_LAYERS_WEIGHTS,
        config=_TWO_LAYERS,
        config_from={"dropout_prob": "seq_classif_dropout"},
    ),
    "ForTokenClassification": HeadRule(
        head_type="tagging",
        weights={"classifier": "layers.0"},
        config=ONE_LAYER,
        config_from={"dropout_prob": "dropout"},
    ),
    "ForQuestionAnswering": HeadRule(
        head_type="question_answering",
        weights={"qa_outputs": "layers.0"},
        config=ONE_LAYER,
        config_from={"dropout_prob": "qa_dropout"},
        output="start_logits",
    ),
    "ForMaskedLM": HeadRule(
        head_type="masked_lm",
        weights={
            "vocab_transform": "layers.0.dense",
            "vocab_layer_norm": "layers.0.norm",
            "vocab_projector.weight": "weight",
            "vocab_projector.bias": "bias",
        },
        config={"layers": 2, "layer_norm": True, "bias": True},
        config_from={"activation_function": "activation"},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """DistilBERT."""
    return [DISTILBERT]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for DistilBERT."""
    return conversions(DISTILBERT, "DistilBert", _HEADS)
