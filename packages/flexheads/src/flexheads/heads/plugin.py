"""The core's own head types, registered like anyone else's."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads.hookspecs import hookimpl
from flexheads.specs import HeadTypeSpec

_TYPES = {
    "classification": ("classification:ClassificationHead", "One label per sequence; regression"),
    "multilabel_classification": (
        "classification:MultiLabelClassificationHead",
        "Any number of labels per sequence",
    ),
    "regression": ("regression:RegressionHead", "One or several numbers per sequence"),
    "ordinal": ("ordinal:OrdinalHead", "One of several levels that have an order (CORAL)"),
    "embedding": ("embedding:EmbeddingHead", "A vector for a sequence, near to those like it"),
    "ranking": ("ranking:RankingHead", "A score per sequence, compared between choices; rewards"),
    "next_sentence": ("classification:NextSentenceHead", "Whether one sentence follows another"),
    "multiple_choice": ("multiple_choice:MultipleChoiceHead", "One of several continuations"),
    "tagging": ("tagging:TaggingHead", "One label per token"),
    "question_answering": (
        "question_answering:QuestionAnsweringHead",
        "Start and end of an answer, if there is one",
    ),
    "dependency_parsing": (
        "dependency_parsing:DependencyParsingHead",
        "The head and the relation of every word",
    ),
    "span_classification": (
        "span_classification:SpanClassificationHead",
        "One label per span of tokens",
    ),
    "detection": ("detection:DetectionHead", "Which tokens were replaced"),
    "masked_lm": ("language_modeling:MaskedLMHead", "Masked language modelling"),
    "causal_lm": ("language_modeling:CausalLMHead", "Causal language modelling"),
    "seq2seq_lm": (
        "sequence_to_sequence:SequenceToSequenceHead",
        "What the decoder of an encoder-decoder model writes",
    ),
    "image_classification": (
        "image_classification:ImageClassificationHead",
        "One label, or any number, per image; regression",
    ),
    "masked_image_modeling": (
        "masked_image:MaskedImageHead",
        "The pixels of an image whose patches are hidden",
    ),
    "masked_image_tokens": (
        "masked_image_tokens:MaskedImageTokensHead",
        "The visual tokens of an image whose patches are hidden",
    ),
    "audio_classification": (
        "audio_classification:AudioClassificationHead",
        "One label, or any number, per sound; regression",
    ),
    "audio_frame_classification": (
        "audio_frame_classification:AudioFrameClassificationHead",
        "One label, or any number, per frame of a sound",
    ),
    "ctc": ("ctc:CTCHead", "Text from sound, without alignment"),
    "xvector": ("xvector:XVectorHead", "One vector for each voice, by the speaker"),
}


@hookimpl
def flexheads_register_head_types() -> Iterable[HeadTypeSpec]:
    """The head types of the core."""
    return [
        HeadTypeSpec(name=name, head=f"flexheads.heads.{where}", description=description)
        for name, (where, description) in _TYPES.items()
    ]
