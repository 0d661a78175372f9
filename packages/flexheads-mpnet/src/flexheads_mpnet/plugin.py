"""What this package registers: where MPNet's sites are, and how its static heads convert."""

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

MPNET = ArchitectureSpec(
    name="mpnet",
    model_types=("mpnet",),
    backbone="transformers.models.mpnet.modeling_mpnet:MPNetModel",
    embeddings="embeddings",
    layers=(
        LayerSpec(
            path="encoder.layer",
            attention=ResidualSite(
                output="attention.dropout", residual="attention", norm="attention.LayerNorm"
            ),
            feed_forward=ResidualSite(
                output="output.dropout", residual="intermediate", norm="output.LayerNorm"
            ),
            query="attention.attn.q",
            key="attention.attn.k",
            value="attention.attn.v",
            attention_output="attention.attn.o",
            mlp_in="intermediate.dense",
            mlp_out="output.dense",
            self_attention="attention.attn",
            norms=("attention.LayerNorm", "output.LayerNorm"),
            adapterhub={"attention": "attention", "feed_forward": "output"},
        ),
    ),
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
    },
)

_ONE_LAYER = {"layers": 1, "activation_function": None}

_HEADS = {
    "MPNetForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"classifier.dense": "layers.0", "classifier.out_proj": "layers.1"},
        config={"layers": 2, "activation_function": "tanh", "use_pooler": False},
    ),
    "MPNetForMultipleChoice": HeadRule(
        head_type="multiple_choice",
        weights={"classifier": "layers.0"},
        config={**_ONE_LAYER, "use_pooler": True},
    ),
    "MPNetForTokenClassification": HeadRule(
        head_type="tagging", weights={"classifier": "layers.0"}, config=_ONE_LAYER
    ),
    "MPNetForQuestionAnswering": HeadRule(
        head_type="question_answering",
        weights={"qa_outputs": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.0},
        output="start_logits",
    ),
    "MPNetForMaskedLM": HeadRule(
        head_type="masked_lm",
        weights={
            "lm_head.dense": "layers.0.dense",
            "lm_head.layer_norm": "layers.0.norm",
            "lm_head.decoder.weight": "weight",
            "lm_head.decoder.bias": "bias",
        },
        config={"layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True},
        aliases={"lm_head.bias": "lm_head.decoder.bias"},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """MPNet."""
    return [MPNET]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for MPNet."""
    return [
        HeadConversion(architecture=MPNET.name, static_class=name, heads=(rule,))
        for name, rule in _HEADS.items()
    ]
