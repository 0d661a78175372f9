"""Every class with a head that transformers has for our architectures converts, or says why not."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator

import pytest
import transformers
from transformers import PreTrainedModel

from flexheads.plugins import registry
from flexheads.specs import ArchitectureSpec

_HEADS = re.compile(r"For[A-Z]|LMHeadModel$|DoubleHeadsModel$|WithProjection$|[a-z]Decoder$")

_DECODER_ALONE = "a decoder without an encoder, which no model with flexible heads is"
_READS_IMAGES_TOO = "belongs to a model type that reads images too, which is not registered"

LEFT_OUT = {
    "BartForCausalLM": _DECODER_ALONE,
    "MBartForCausalLM": _DECODER_ALONE,
    "PLBartForCausalLM": _DECODER_ALONE,
    "WhisperForCausalLM": _DECODER_ALONE,
    "Gemma3ForConditionalGeneration": _READS_IMAGES_TOO,
    "Gemma3ForSequenceClassification": _READS_IMAGES_TOO,
    "BeitForSemanticSegmentation": "its head is a network of its own over several layers",
    "Wav2Vec2ForPreTraining": "its targets come from a quantiser inside the class",
    "Wav2Vec2ForMaskedLM": "has the layer of Wav2Vec2ForCTC and no loss; transformers 5 dropped it",
}
"""Classes without a conversion, and why."""


def _available() -> list[ArchitectureSpec]:
    """Architectures whose modelling code this release has; composed ones have none of their own."""
    found = []
    for spec in registry().architectures.values():
        name = spec.backbone.partition(":")[0]
        if not spec.composed and importlib.util.find_spec(name) is not None:
            found.append(spec)
    return found


def _classes(spec: ArchitectureSpec) -> Iterator[str]:
    """The public classes with a head beside an architecture's backbone."""
    module = importlib.import_module(spec.backbone.partition(":")[0])
    for name, value in vars(module).items():
        own = inspect.isclass(value) and value.__module__ == module.__name__
        public = own and issubclass(value, PreTrainedModel) and hasattr(transformers, name)
        if public and _HEADS.search(name):
            yield name


SPECS = _available()


def test_most_architectures_are_looked_at() -> None:
    seen = {name for spec in SPECS for name in _classes(spec)}
    assert len(SPECS) >= 45
    assert len(seen) >= 170


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_class_with_a_head_converts(spec: ArchitectureSpec) -> None:
    missing = [n for n in _classes(spec) if n not in registry().conversions and n not in LEFT_OUT]
    assert not missing, f"{', '.join(missing)}: add a conversion, or say in LEFT_OUT why not."


def test_what_is_left_out_has_no_conversion() -> None:
    assert not set(LEFT_OUT) & set(registry().conversions)


def test_every_conversion_is_of_a_class_of_its_architecture() -> None:
    """So that a misspelt class, which no release has, is seen."""
    known = {spec.name: set(_classes(spec)) for spec in SPECS}
    for conversion in registry().conversions.values():
        exists = hasattr(transformers, conversion.static_class)
        if exists and conversion.architecture in known:
            assert conversion.static_class in known[conversion.architecture]
