"""What this package registers: where ELECTRA's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import (
    ArchitectureSpec,
    HeadConversion,
    HeadRule,
    LayerSpec,
    ResidualSite,
    hookimpl,
)

ELECTRA = ArchitectureSpec(
    name="electra",
    model_types=("electra",),
    backbone="transformers.models.electra.modeling_electra:ElectraModel",
    embeddings="embeddings",
    layers=(
        LayerSpec(
            path="encoder.layer",
            attention=ResidualSite(
                output="attention.output.dropout",
                residual="attention",
                norm="attention.output.LayerNorm",
            ),
            feed_forward=ResidualSite(
                output="output.dropout", residual="intermediate", norm="output.LayerNorm"
            ),
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            attention_output="attention.output.dense",
            mlp_in="intermediate.dense",
            mlp_out="output.dense",
            self_attention="attention.self",
            norms=("attention.output.LayerNorm", "output.LayerNorm"),
            adapterhub={"attention": "attention.output", "feed_forward": "output"},
        ),
    ),
    norms=("embeddings.LayerNorm",),
    pooling="first_token",
    shares_layers=True,
    tiny={
        "embedding_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
    },
)

_ONE_LAYER = {"layers": 1, "activation_function": None}
_TWO_LAYERS = {"layers": 2, "activation_function": "gelu", "use_pooler": False}


def _lm(head_type: str) -> HeadRule:
    return HeadRule(
        head_type=head_type,
        weights={
            "generator_predictions.dense": "layers.0.dense",
            "generator_predictions.LayerNorm": "layers.0.norm",
            "generator_lm_head.weight": "weight",
            "generator_lm_head.bias": "bias",
        },
        config={"layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True},
    )


_HEADS = {
    "ElectraForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"classifier.dense": "layers.0", "classifier.out_proj": "layers.1"},
        config=_TWO_LAYERS,
    ),
    "ElectraForMultipleChoice": HeadRule(
        head_type="multiple_choice",
        weights={"sequence_summary.summary": "layers.0", "classifier": "layers.1"},
        config=_TWO_LAYERS,
    ),
    "ElectraForTokenClassification": HeadRule(
        head_type="tagging", weights={"classifier": "layers.0"}, config=_ONE_LAYER
    ),
    "ElectraForQuestionAnswering": HeadRule(
        head_type="question_answering",
        weights={"qa_outputs": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.0},
        output="start_logits",
    ),
    "ElectraForPreTraining": HeadRule(
        head_type="detection",
        weights={
            "discriminator_predictions.dense": "layers.0",
            "discriminator_predictions.dense_prediction": "layers.1",
        },
        config={"layers": 2, "layer_norm": False, "bias": True, "dropout_prob": 0.0},
        config_from={"activation_function": "hidden_act"},
    ),
    "ElectraForMaskedLM": _lm("masked_lm"),
    "ElectraForCausalLM": _lm("causal_lm"),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """ELECTRA."""
    return [ELECTRA]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for ELECTRA."""
    return [
        HeadConversion(architecture=ELECTRA.name, static_class=name, heads=(rule,))
        for name, rule in _HEADS.items()
    ]
