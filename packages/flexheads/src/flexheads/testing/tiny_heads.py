"""Tiny heads of every type, and random labels for them.

A type of another package is a tiny head too where its class says so: with ``tiny``, a mapping of
fields of its configuration, and ``tiny_labels``, a method that takes what `tiny_labels` takes. Both
are inherited, and a type with labels like those of a class of the core needs neither.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from flexheads.heads.audio_frame_classification import AudioFrameClassificationHead
from flexheads.heads.base import PredictionHead
from flexheads.heads.classification import ClassificationHead
from flexheads.heads.ctc import CTCHead
from flexheads.heads.custom import class_of
from flexheads.heads.dependency_parsing import DependencyParsingHead
from flexheads.heads.detection import DetectionHead
from flexheads.heads.embedding import EmbeddingHead
from flexheads.heads.labels import InputShape
from flexheads.heads.language_modeling import LanguageModelHead
from flexheads.heads.masked_image import MaskedImageHead
from flexheads.heads.masked_image_tokens import MaskedImageTokensHead
from flexheads.heads.multiple_choice import MultipleChoiceHead
from flexheads.heads.ordinal import OrdinalHead
from flexheads.heads.question_answering import QuestionAnsweringHead
from flexheads.heads.ranking import RankingHead
from flexheads.heads.regression import RegressionHead
from flexheads.heads.span_classification import SpanClassificationHead
from flexheads.heads.tagging import TaggingHead
from flexheads.heads.xvector import XVectorHead
from flexheads.specs import ArchitectureSpec

LABELS, CHOICES = 3, 2

_FIELDS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"num_choices": CHOICES},
    "ranking": {"num_choices": CHOICES},
    "masked_image_tokens": {"vocab_size": 8},
    "ctc": {"vocab_size": 8, "blank": 0, "zero_infinity": True},
    "xvector": {"sizes": (6, 8), "kernels": (2, 1), "dilations": (1, 1), "embedding_size": 5},
}
"""What types of the core need to be tiny, beside a number of labels."""


def tiny_head(head_type: str, architecture: ArchitectureSpec) -> dict[str, Any]:
    """The fields of a tiny head of a type, on an architecture.

    Args:
        head_type: The type.
        architecture: Heads that need what the encoder reads are put there, not at the decoder.
    """
    kind = class_of(head_type)
    named = {field.name: field.default for field in dataclasses.fields(kind.config_class)}
    fields: dict[str, Any] = {}
    if named.get("num_labels") is dataclasses.MISSING:
        fields["num_labels"] = LABELS
    if kind.needs in ("sound", "pixels") and "decoder" in architecture.gives:
        fields["side"] = "encoder"
    return {**fields, **_FIELDS.get(head_type, {}), **getattr(kind, "tiny", {})}


@functools.singledispatch
def tiny_labels(
    head: PredictionHead, shape: InputShape, generator: Generator
) -> Mapping[str, Tensor]:
    """Random labels for a head, as arguments of the model.

    Args:
        head: The head.
        shape: Rows, an even number, and positions of what the head reads.
        generator: Of the random numbers.

    Raises:
        LookupError: If the head's class has no method of this name, and is none of the core's.
    """
    own = getattr(head, "tiny_labels", None)
    if own is None:
        raise LookupError(
            f"{type(head).__name__} makes no labels for tests: give it a method "
            "tiny_labels(shape, generator) that returns a mapping of label arguments."
        )
    labels: Mapping[str, Tensor] = own(shape, generator)
    return labels


def makes_labels(kind: type[PredictionHead]) -> bool:
    """Whether `tiny_labels` can make labels for heads of a class."""
    return tiny_labels.dispatch(kind) is not _OF_OTHERS or hasattr(kind, "tiny_labels")


_OF_OTHERS = tiny_labels.dispatch(object)


def _classes(count: int, shape: tuple[int, ...], generator: Generator) -> dict[str, Tensor]:
    return {"labels": torch.randint(count, shape, generator=generator)}


def _length(shape: InputShape) -> int:
    assert shape.length is not None
    return shape.length


@tiny_labels.register
def _(head: ClassificationHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    if head.problem_type == "multi_label_classification":
        classes = torch.randint(2, (shape.rows, head.num_outputs), generator=generator)
        return {"labels": classes.float()}
    return _classes(head.num_outputs, (shape.rows,), generator)


@tiny_labels.register
def _(head: RegressionHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    return {"labels": torch.randn(shape.rows, head.num_outputs, generator=generator)}


@tiny_labels.register
def _(head: OrdinalHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    return _classes(LABELS, (shape.rows,), generator)


@tiny_labels.register(EmbeddingHead)
def _(head: PredictionHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    pairs = torch.arange(shape.rows) // 2
    return {"labels": pairs[torch.randperm(shape.rows, generator=generator)]}


@tiny_labels.register(MultipleChoiceHead)
@tiny_labels.register(RankingHead)
def _(head: PredictionHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    return _classes(CHOICES, (shape.rows // CHOICES,), generator)


@tiny_labels.register(TaggingHead)
@tiny_labels.register(AudioFrameClassificationHead)
@tiny_labels.register(LanguageModelHead)
def _(head: PredictionHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    return _classes(head.num_outputs, (shape.rows, _length(shape)), generator)


@tiny_labels.register
def _(head: DetectionHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    return _classes(2, (shape.rows, _length(shape)), generator)


@tiny_labels.register
def _(head: QuestionAnsweringHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    start = torch.randint(_length(shape), (shape.rows,), generator=generator)
    return {"start_positions": start, "end_positions": start}


@tiny_labels.register
def _(head: DependencyParsingHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    words = torch.tensor([[1, 2, 3]]).expand(shape.rows, -1)  # two of one token each
    arcs = torch.randint(3, (shape.rows, 2), generator=generator)
    relations = torch.randint(head.num_outputs, (shape.rows, 2), generator=generator)
    return {"word_starts": words, "labels_arcs": arcs, "labels_rels": relations}


@tiny_labels.register
def _(
    head: SpanClassificationHead, shape: InputShape, generator: Generator
) -> Mapping[str, Tensor]:
    spans = torch.randint(_length(shape), (shape.rows, 2, 2), generator=generator)
    classes = _classes(head.num_outputs, (shape.rows, 2), generator)
    return {"spans": spans.sort(dim=-1).values, **classes}


@tiny_labels.register
def _(head: MaskedImageHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    size = math.isqrt(_length(shape)) * head.config.stride
    images = (shape.rows, head.config.num_channels, size, size)
    return {"labels": torch.randn(images, generator=generator)}


@tiny_labels.register
def _(head: MaskedImageTokensHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    patches = math.isqrt(_length(shape)) ** 2
    return _classes(head.num_outputs, (shape.rows, patches), generator)


@tiny_labels.register
def _(head: CTCHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    text = torch.randint(1, head.num_outputs, (shape.rows, 2), generator=generator)
    return {"labels": text}


@tiny_labels.register
def _(head: XVectorHead, shape: InputShape, generator: Generator) -> Mapping[str, Tensor]:
    return _classes(head.num_outputs, (shape.rows,), generator)
