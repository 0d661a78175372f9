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
    "next_sentence": ("classification:NextSentenceHead", "Whether one sentence follows another"),
    "multiple_choice": ("multiple_choice:MultipleChoiceHead", "One of several continuations"),
    "tagging": ("tokens:TaggingHead", "One label per token"),
    "question_answering": ("tokens:QuestionAnsweringHead", "Start and end of an answer"),
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
}


@hookimpl
def flexheads_register_head_types() -> Iterable[HeadTypeSpec]:
    """The head types of the core."""
    return [
        HeadTypeSpec(name=name, head=f"flexheads.heads.{where}", description=description)
        for name, (where, description) in _TYPES.items()
    ]
