"""What this package registers: where the sites of BERT are, and of BERT for generation; heads."""

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

LAYER = LayerSpec(
    path="encoder.layer",
    when={"add_cross_attention": False},
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

# In a decoder that attends to an encoder too.
WITH_CROSS_ATTENTION = replace(
    LAYER,
    when={"add_cross_attention": True},
    cross_attention=ResidualSite(
        output="crossattention.output.dropout",
        residual="crossattention",
        norm="crossattention.output.LayerNorm",
    ),
    cross_query="crossattention.self.query",
    cross_key="crossattention.self.key",
    cross_value="crossattention.self.value",
    cross_attention_output="crossattention.output.dense",
    encoder_attention="crossattention.self",
    norms=(*LAYER.norms, "crossattention.output.LayerNorm"),
    adapterhub={**LAYER.adapterhub, "cross_attention": "crossattention.output"},
)

BERT = ArchitectureSpec(
    name="bert",
    model_types=("bert",),
    backbone="transformers.models.bert.modeling_bert:BertModel",
    embeddings="embeddings",
    layers=(LAYER, WITH_CROSS_ATTENTION),
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

BERT_GENERATION = replace(
    BERT,
    name="bert-generation",
    model_types=("bert-generation",),
    backbone=("transformers.models.bert_generation.modeling_bert_generation:BertGenerationEncoder"),
    pooler=False,
)

_ONE_LAYER = {"layers": 1, "activation_function": None}
_POOLED = {**_ONE_LAYER, "use_pooler": True}
_LM = {"layers": 2, "layer_norm": True, "bias": True}
_LM_WEIGHTS = {
    "cls.predictions.transform.dense": "layers.0.dense",
    "cls.predictions.transform.LayerNorm": "layers.0.norm",
    "cls.predictions.decoder.weight": "weight",
    "cls.predictions.decoder.bias": "bias",
}


def _lm(head_type: str, output: str = "logits") -> HeadRule:
    return HeadRule(
        head_type=head_type,
        weights=_LM_WEIGHTS,
        config=_LM,
        config_from={"activation_function": "hidden_act"},
        aliases={"cls.predictions.bias": "cls.predictions.decoder.bias"},
        output=output,
    )


def _next_sentence(suffix: str = "", output: str = "logits") -> HeadRule:
    return HeadRule(
        head_type="next_sentence",
        weights={"cls.seq_relationship": "layers.0"},
        config={**_POOLED, "dropout_prob": 0.0},
        suffix=suffix,
        output=output,
    )


_HEADS: dict[str, tuple[HeadRule, ...]] = {
    "BertForSequenceClassification": (
        HeadRule(head_type="classification", weights={"classifier": "layers.0"}, config=_POOLED),
    ),
    "BertForMultipleChoice": (
        HeadRule(head_type="multiple_choice", weights={"classifier": "layers.0"}, config=_POOLED),
    ),
    "BertForTokenClassification": (
        HeadRule(head_type="tagging", weights={"classifier": "layers.0"}, config=_ONE_LAYER),
    ),
    "BertForQuestionAnswering": (
        HeadRule(
            head_type="question_answering",
            weights={"qa_outputs": "layers.0"},
            config={**_ONE_LAYER, "dropout_prob": 0.0},
            output="start_logits",
        ),
    ),
    "BertForMaskedLM": (_lm("masked_lm"),),
    "BertLMHeadModel": (_lm("causal_lm"),),
    "BertForNextSentencePrediction": (_next_sentence(),),
    "BertForPreTraining": (
        _lm("masked_lm", output="prediction_logits"),
        _next_sentence(suffix="_next_sentence", output="seq_relationship_logits"),
    ),
}

_GENERATION_HEAD = HeadRule(
    head_type="causal_lm",
    weights={"lm_head.decoder.weight": "weight", "lm_head.decoder.bias": "bias"},
    config={**_ONE_LAYER, "layer_norm": False, "bias": True},
    aliases={"lm_head.bias": "lm_head.decoder.bias"},
)


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """BERT, and BERT for generation."""
    return [BERT, BERT_GENERATION]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for them."""
    generation = HeadConversion(
        architecture=BERT_GENERATION.name,
        static_class="BertGenerationDecoder",
        heads=(_GENERATION_HEAD,),
    )
    return [
        *(
            HeadConversion(architecture=BERT.name, static_class=name, heads=rules)
            for name, rules in _HEADS.items()
        ),
        generation,
    ]
