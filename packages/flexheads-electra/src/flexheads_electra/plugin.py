"""What this package registers: where ELECTRA's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, hookimpl
from flexheads.layouts import ENCODER_HEADS, NORM_LAST_LAYERS, TINY, conversions

ELECTRA = ArchitectureSpec(
    name="electra",
    model_types=("electra",),
    backbone="transformers.models.electra.modeling_electra:ElectraModel",
    embeddings="embeddings",
    layers=(NORM_LAST_LAYERS,),
    norms=("embeddings.LayerNorm",),
    pooling="first_token",
    shares_layers=True,
    tiny={**TINY, "embedding_size": 16},
)

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
    "ForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"classifier.dense": "layers.0", "classifier.out_proj": "layers.1"},
        config=_TWO_LAYERS,
    ),
    "ForMultipleChoice": HeadRule(
        head_type="multiple_choice",
        weights={"sequence_summary.summary": "layers.0", "classifier": "layers.1"},
        config=_TWO_LAYERS,
    ),
    "ForTokenClassification": ENCODER_HEADS["ForTokenClassification"],
    "ForQuestionAnswering": ENCODER_HEADS["ForQuestionAnswering"],
    "ForPreTraining": HeadRule(
        head_type="detection",
        weights={
            "discriminator_predictions.dense": "layers.0",
            "discriminator_predictions.dense_prediction": "layers.1",
        },
        config={"layers": 2, "layer_norm": False, "bias": True, "dropout_prob": 0.0},
        config_from={"activation_function": "hidden_act"},
    ),
    "ForMaskedLM": _lm("masked_lm"),
    "ForCausalLM": _lm("causal_lm"),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """ELECTRA."""
    return [ELECTRA]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for ELECTRA."""
    return conversions(ELECTRA, "Electra", _HEADS)
