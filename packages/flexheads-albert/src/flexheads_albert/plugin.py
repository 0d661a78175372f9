"""What this package registers: where ALBERT's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import ENCODER_HEADS, ONE_LAYER, conversions

ALBERT = ArchitectureSpec(
    name="albert",
    model_types=("albert",),
    backbone="transformers.models.albert.modeling_albert:AlbertModel",
    embeddings="embeddings",
    layers=(
        LayerSpec(
            # What is here runs many times in a call, and its adapters with it.
            path="encoder.albert_layer_groups.*.albert_layers",
            attention=ResidualSite(
                output="attention.output_dropout",
                residual="attention",
                norm="attention.LayerNorm",
            ),
            feed_forward=ResidualSite(
                output="ffn_output", residual="ffn", norm="full_layer_layer_norm"
            ),
            query="attention.query",
            key="attention.key",
            value="attention.value",
            attention_output="attention.dense",
            mlp_in="ffn",
            mlp_out="ffn_output",
            self_attention="attention",
            norms=("attention.LayerNorm", "full_layer_layer_norm"),
            adapterhub={
                "attention": "attention.attention_adapters",
                "feed_forward": "output_adapters",
            },
        ),
    ),
    norms=("embeddings.LayerNorm",),
    pooling="first_token",
    pooler=True,
    tiny={
        "hidden_size": 32,
        "embedding_size": 16,
        "num_hidden_layers": 4,
        "num_hidden_groups": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
    },
)

_POOLED = {**ONE_LAYER, "use_pooler": True}


def _lm(output: str = "logits") -> HeadRule:
    return HeadRule(
        head_type="masked_lm",
        weights={
            "predictions.dense": "layers.0.dense",
            "predictions.LayerNorm": "layers.0.norm",
            "predictions.decoder.weight": "weight",
            "predictions.decoder.bias": "bias",
        },
        config={"layers": 2, "layer_norm": True, "bias": True},
        config_from={"activation_function": "hidden_act"},
        aliases={"predictions.bias": "predictions.decoder.bias"},
        output=output,
    )


_HEADS: dict[str, HeadRule | tuple[HeadRule, ...]] = {
    "ForSequenceClassification": HeadRule(
        head_type="classification", weights={"classifier": "layers.0"}, config=_POOLED
    ),
    "ForMultipleChoice": ENCODER_HEADS["ForMultipleChoice"],
    "ForTokenClassification": ENCODER_HEADS["ForTokenClassification"],
    "ForQuestionAnswering": ENCODER_HEADS["ForQuestionAnswering"],
    "ForMaskedLM": _lm(),
    "ForPreTraining": (
        _lm(output="prediction_logits"),
        HeadRule(
            head_type="next_sentence",
            weights={"sop_classifier.classifier": "layers.0"},
            config=_POOLED,
            suffix="_sentence_order",
            output="sop_logits",
        ),
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """ALBERT."""
    return [ALBERT]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for ALBERT."""
    return conversions(ALBERT, "Albert", _HEADS)
