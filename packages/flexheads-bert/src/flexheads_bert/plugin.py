"""What this package registers: where the sites of BERT are, and of BERT for generation; heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, ResidualSite, hookimpl
from flexheads.layouts import ENCODER_HEADS, NORM_LAST_LAYERS, ONE_LAYER, TINY, conversions

LAYER = replace(NORM_LAST_LAYERS, when={"add_cross_attention": False})

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
    tiny=TINY,
)

BERT_GENERATION = replace(
    BERT,
    name="bert-generation",
    model_types=("bert-generation",),
    backbone=("transformers.models.bert_generation.modeling_bert_generation:BertGenerationEncoder"),
    pooler=False,
)

_POOLED = {**ONE_LAYER, "use_pooler": True}
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


_HEADS: dict[str, HeadRule | tuple[HeadRule, ...]] = {
    "ForSequenceClassification": HeadRule(
        head_type="classification", weights={"classifier": "layers.0"}, config=_POOLED
    ),
    "ForMultipleChoice": ENCODER_HEADS["ForMultipleChoice"],
    "ForTokenClassification": ENCODER_HEADS["ForTokenClassification"],
    "ForQuestionAnswering": ENCODER_HEADS["ForQuestionAnswering"],
    "ForMaskedLM": _lm("masked_lm"),
    "LMHeadModel": _lm("causal_lm"),
    "ForNextSentencePrediction": _next_sentence(),
    "ForPreTraining": (
        _lm("masked_lm", output="prediction_logits"),
        _next_sentence(suffix="_next_sentence", output="seq_relationship_logits"),
    ),
}

_GENERATION_HEAD = HeadRule(
    head_type="causal_lm",
    weights={"lm_head.decoder.weight": "weight", "lm_head.decoder.bias": "bias"},
    config={**ONE_LAYER, "layer_norm": False, "bias": True},
    aliases={"lm_head.bias": "lm_head.decoder.bias"},
)


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """BERT, and BERT for generation."""
    return [BERT, BERT_GENERATION]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for them."""
    return [
        *conversions(BERT, "Bert", _HEADS),
        *conversions(BERT_GENERATION, "BertGeneration", {"Decoder": _GENERATION_HEAD}),
    ]
