"""What this package registers: where DeBERTa's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, hookimpl
from flexheads.layouts import ENCODER_HEADS, NORM_LAST_LAYERS, TINY, conversions, thirds

_V2_LAYERS = replace(
    NORM_LAST_LAYERS,
    query="attention.self.query_proj",
    key="attention.self.key_proj",
    value="attention.self.value_proj",
)

DEBERTA_V2 = ArchitectureSpec(
    name="deberta-v2",
    model_types=("deberta-v2",),
    backbone="transformers.models.deberta_v2.modeling_deberta_v2:DebertaV2Model",
    embeddings="embeddings",
    layers=(_V2_LAYERS,),
    norms=("embeddings.LayerNorm",),
    pooling="first_token",
    shares_layers=True,
    tiny={
        **TINY,
        "pooler_hidden_size": 32,
        # As in version 3.
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
)

_TINY = {k: v for k, v in DEBERTA_V2.tiny.items() if k not in ("position_buckets", "share_att_key")}

DEBERTA = replace(
    DEBERTA_V2,
    name="deberta",
    model_types=("deberta",),
    backbone="transformers.models.deberta.modeling_deberta:DebertaModel",
    layers=(
        replace(
            _V2_LAYERS,
            query="attention.self.in_proj",
            key="attention.self.in_proj",
            value="attention.self.in_proj",
            fused=thirds(groups="num_attention_heads"),
            # Keys and values come out of one projection, head by head, and go into scores that no
            # function of transformers computes: a prefix has no way in.
            self_attention=None,
        ),
    ),
    tiny=_TINY,
)

_POOLED: dict[str, Any] = {
    "weights": {"pooler.dense": "layers.0", "classifier": "layers.1"},
    "config": {"layers": 2, "use_pooler": False},
    "config_from": {"activation_function": "pooler_hidden_act"},
}

# Models that are not "legacy" have a masked-LM head by other names, which is not converted.
_HEADS = {
    "ForSequenceClassification": HeadRule(head_type="classification", **_POOLED),
    "ForTokenClassification": ENCODER_HEADS["ForTokenClassification"],
    "ForQuestionAnswering": ENCODER_HEADS["ForQuestionAnswering"],
    "ForMaskedLM": HeadRule(
        head_type="masked_lm",
        weights={
            "cls.predictions.transform.dense": "layers.0.dense",
            "cls.predictions.transform.LayerNorm": "layers.0.norm",
            "cls.predictions.decoder.weight": "weight",
            "cls.predictions.decoder.bias": "bias",
        },
        config={"layers": 2, "layer_norm": True, "bias": True},
        config_from={"activation_function": "hidden_act"},
        aliases={"cls.predictions.bias": "cls.predictions.decoder.bias"},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """DeBERTa: version 1; versions 2 and 3."""
    return [DEBERTA, DEBERTA_V2]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for DeBERTa."""
    choice = HeadRule(head_type="multiple_choice", **_POOLED)
    return [
        *conversions(DEBERTA_V2, "DebertaV2", {**_HEADS, "ForMultipleChoice": choice}),
        *conversions(DEBERTA, "Deberta", _HEADS),
    ]
