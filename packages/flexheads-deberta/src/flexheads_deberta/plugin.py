"""What this package registers: where DeBERTa's sites are, and how its static heads convert."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from flexheads import (
    ArchitectureSpec,
    FusedBlock,
    HeadConversion,
    HeadRule,
    LayerSpec,
    ResidualSite,
    hookimpl,
)

_V2_LAYERS = LayerSpec(
    path="encoder.layer",
    attention=ResidualSite(
        output="attention.output.dropout",
        residual="attention",
        norm="attention.output.LayerNorm",
    ),
    feed_forward=ResidualSite(
        output="output.dropout", residual="intermediate", norm="output.LayerNorm"
    ),
    query="attention.self.query_proj",
    key="attention.self.key_proj",
    value="attention.self.value_proj",
    attention_output="attention.output.dense",
    mlp_in="intermediate.dense",
    mlp_out="output.dense",
    self_attention="attention.self",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    adapterhub={"attention": "attention.output", "feed_forward": "output"},
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
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
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

DEBERTA = dataclasses.replace(
    DEBERTA_V2,
    name="deberta",
    model_types=("deberta",),
    backbone="transformers.models.deberta.modeling_deberta:DebertaModel",
    layers=(
        dataclasses.replace(
            _V2_LAYERS,
            query="attention.self.in_proj",
            key="attention.self.in_proj",
            value="attention.self.in_proj",
            fused={
                role: FusedBlock(index, 3, groups="num_attention_heads")
                for index, role in enumerate(("query", "key", "value"))
            },
            # Keys and values come out of one projection, head by head, and go into scores that no
            # function of transformers computes: a prefix has no way in.
            self_attention=None,
        ),
    ),
    tiny=_TINY,
)

_ONE_LAYER = {"layers": 1, "activation_function": None}
_POOLED = {
    "weights": {"pooler.dense": "layers.0", "classifier": "layers.1"},
    "config": {"layers": 2, "use_pooler": False},
    "config_from": {"activation_function": "pooler_hidden_act"},
}

# Models that are not "legacy" have a masked-LM head by other names, which is not converted.
_HEADS = {
    "ForSequenceClassification": HeadRule(head_type="classification", **_POOLED),
    "ForTokenClassification": HeadRule(
        head_type="tagging", weights={"classifier": "layers.0"}, config=_ONE_LAYER
    ),
    "ForQuestionAnswering": HeadRule(
        head_type="question_answering",
        weights={"qa_outputs": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.0},
        output="start_logits",
    ),
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
_STATIC = {
    **{f"DebertaV2{name}": (DEBERTA_V2, rule) for name, rule in _HEADS.items()},
    **{f"Deberta{name}": (DEBERTA, rule) for name, rule in _HEADS.items()},
    "DebertaV2ForMultipleChoice": (DEBERTA_V2, HeadRule(head_type="multiple_choice", **_POOLED)),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """DeBERTa: version 1; versions 2 and 3."""
    return [DEBERTA, DEBERTA_V2]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for DeBERTa."""
    return [
        HeadConversion(architecture=spec.name, static_class=name, heads=(rule,))
        for name, (spec, rule) in _STATIC.items()
    ]
