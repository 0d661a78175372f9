"""What this package registers: the sites of RoBERTa's family, and how its static heads convert."""

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

LAYERS = LayerSpec(
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
)

ROBERTA = ArchitectureSpec(
    name="roberta",
    model_types=("roberta",),
    backbone="transformers.models.roberta.modeling_roberta:RobertaModel",
    embeddings="embeddings",
    layers=(LAYERS,),
    norms=("embeddings.LayerNorm",),
    pooling="first_token",
    pooler=True,
    shares_layers=True,
    tiny={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
    },
)

XLM_ROBERTA = replace(
    ROBERTA,
    name="xlm-roberta",
    model_types=("xlm-roberta",),
    backbone="transformers.models.xlm_roberta.modeling_xlm_roberta:XLMRobertaModel",
)

CAMEMBERT = replace(
    ROBERTA,
    name="camembert",
    model_types=("camembert",),
    backbone="transformers.models.camembert.modeling_camembert:CamembertModel",
)

# Its norms come first, and its embeddings have none.
XLM_ROBERTA_XL = replace(
    ROBERTA,
    name="xlm-roberta-xl",
    model_types=("xlm-roberta-xl",),
    backbone="transformers.models.xlm_roberta_xl.modeling_xlm_roberta_xl:XLMRobertaXLModel",
    layers=(
        replace(
            LAYERS,
            attention=ResidualSite(
                output="attention.output.dropout", residual="attention.self_attn_layer_norm"
            ),
            feed_forward=ResidualSite(output="output.dense", residual="LayerNorm"),
            norms=("attention.self_attn_layer_norm", "LayerNorm"),
        ),
    ),
    norms=("encoder.LayerNorm",),
)

# What each is called, and the words that its classes begin with.
_FAMILY = (
    (ROBERTA, "Roberta"),
    (XLM_ROBERTA, "XLMRoberta"),
    (CAMEMBERT, "Camembert"),
    (XLM_ROBERTA_XL, "XLMRobertaXL"),
)

_ONE_LAYER = {"layers": 1, "activation_function": None}


def _lm(head_type: str) -> HeadRule:
    return HeadRule(
        head_type=head_type,
        weights={
            "lm_head.dense": "layers.0.dense",
            "lm_head.layer_norm": "layers.0.norm",
            "lm_head.decoder.weight": "weight",
            "lm_head.decoder.bias": "bias",
        },
        config={"layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True},
        aliases={"lm_head.bias": "lm_head.decoder.bias"},
    )


_HEADS = {
    "ForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"classifier.dense": "layers.0", "classifier.out_proj": "layers.1"},
        config={"layers": 2, "activation_function": "tanh", "use_pooler": False},
    ),
    "ForMultipleChoice": HeadRule(
        head_type="multiple_choice",
        weights={"classifier": "layers.0"},
        config={**_ONE_LAYER, "use_pooler": True},
    ),
    "ForTokenClassification": HeadRule(
        head_type="tagging", weights={"classifier": "layers.0"}, config=_ONE_LAYER
    ),
    "ForQuestionAnswering": HeadRule(
        head_type="question_answering",
        weights={"qa_outputs": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.0},
        output="start_logits",
    ),
    "ForMaskedLM": _lm("masked_lm"),
    "ForCausalLM": _lm("causal_lm"),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """RoBERTa, XLM-RoBERTa, CamemBERT and XLM-RoBERTa-XL."""
    return [spec for spec, _ in _FAMILY]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for them."""
    return [
        HeadConversion(architecture=spec.name, static_class=word + name, heads=(rule,))
        for spec, word in _FAMILY
        for name, rule in _HEADS.items()
    ]
