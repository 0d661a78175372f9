"""flexheads.layouts: rows that packages share."""

from __future__ import annotations

from flexheads import registry
from flexheads.layouts import (
    DECODER_HEADS,
    DECODER_LAYERS,
    ENCODER_HEADS,
    ENCODER_LAYERS,
    GATED_LAYERS,
    NORM_LAST_LAYERS,
    conversions,
)
from flexheads.specs import ArchitectureSpec, HeadConversion

ACME = ArchitectureSpec(name="acme", model_types=("acme",), backbone="acme:AcmeModel")
LM = DECODER_HEADS["ForCausalLM"]


def test_conversions_put_words_before_the_ends_and_take_one_rule_or_several() -> None:
    both = (LM, ENCODER_HEADS["ForMultipleChoice"])
    assert conversions(ACME, "Acme", {"ForCausalLM": LM, "DoubleHeadsModel": both}) == [
        HeadConversion(architecture="acme", static_class="AcmeForCausalLM", heads=(LM,)),
        HeadConversion(architecture="acme", static_class="AcmeDoubleHeadsModel", heads=both),
    ]


def test_each_layout_is_that_of_some_architecture_as_it_stands() -> None:
    layers = [own for spec in registry().architectures.values() for own in spec.layers]
    for layout in (GATED_LAYERS, NORM_LAST_LAYERS, ENCODER_LAYERS, DECODER_LAYERS):
        assert layout in layers


def test_each_rule_is_that_of_some_class_as_it_stands() -> None:
    rules = [rule for one in registry().conversions.values() for rule in one.heads]
    for rule in (*DECODER_HEADS.values(), *ENCODER_HEADS.values()):
        assert rule in rules
