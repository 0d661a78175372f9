"""Tagging heads: which labels they take, and the spans that their labels tell of."""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
import transformers

from flexheads.errors import ConfigError, LabelError, UnsupportedError
from flexheads.heads import Source, TaggingHead
from flexheads.testing import tiny_inputs, tiny_model, tiny_static

TEXTS = (
    "Anna Smith works in Berlin, Germany.",
    "The United Nations are since 1998 in New York!",
    "She lives.",
)
BIO = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.fixture(scope="module")
def pair(wordpieces: Any) -> tuple[Any, Any]:
    """A static model with random weights, and a flexible one that has the same."""
    size = {"vocab_size": len(wordpieces)}
    static = tiny_static("BertForTokenClassification", **size, num_labels=len(BIO))
    static.config.id2label = dict(enumerate(BIO))
    with torch.no_grad():
        static.classifier.weight.mul_(4)  # so that spans are found, and words disagree
    model = tiny_model("bert", **size)
    model.bert.load_state_dict(static.bert.state_dict(), strict=False)
    named = dict(enumerate(BIO))
    model.add_tagging_head("ner", id2label=named, layers=1, activation_function=None)
    model.heads["ner"].layers.get_submodule("0").load_state_dict(static.classifier.state_dict())
    return static, model


@torch.no_grad()
def decode(model: Any, read: Any, *texts: Any, **options: Any) -> list[Any]:
    inputs, source = read(*texts)
    return model.heads["ner"].decode(model(**inputs), source, **options)


@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
def test_spans_are_those_of_the_pipeline(
    pair: tuple[Any, Any], wordpieces: Any, read: Any, aggregation: str
) -> None:
    static, model = pair
    pipeline = transformers.TokenClassificationPipeline(
        model=static, tokenizer=wordpieces, aggregation_strategy=aggregation
    )
    found = decode(model, read, *TEXTS, aggregation=aggregation)
    count, several = 0, 0
    for text, spans in zip(TEXTS, found, strict=True):
        expected = pipeline(text)
        assert len(spans) == len(expected)
        for own, other in zip(spans, expected, strict=True):
            assert {k: own[k] for k in own if k not in ("score", "word")} == {
                k: other[k] for k in own if k not in ("score", "word")
            }
            assert own["score"] == pytest.approx(float(other["score"]), abs=1e-5)
            assert own["word"] == text[own["start"] : own["end"]]
            count, several = count + 1, several + (" " in own["word"])
    assert count > 5
    assert several or aggregation == "none"


def test_aggregations_disagree_here(pair: tuple[Any, Any], read: Any) -> None:
    """Or the comparison with the pipeline would not tell them apart."""
    ways = ["simple", "first", "average", "max"]
    found = [str(decode(pair[1], read, *TEXTS, aggregation=way)) for way in ways]
    assert len(set(found)) == len(ways)


def head(labels: Sequence[str]) -> TaggingHead:
    model = tiny_model("bert")
    model.add_tagging_head("ner", id2label=dict(enumerate(labels)))
    found: Any = model.heads["ner"]
    return found


def spans(labels: Sequence[str], given: Sequence[str], **options: Any) -> list[tuple[str, str]]:
    """What is found where each letter of a text is a token with a given label."""
    logits = torch.full((1, len(given), len(labels)), -9.0)
    for place, label in enumerate(given):
        logits[0, place, labels.index(label)] = 9.0
    text = "abcdefghijkl"[: len(given)]
    places = torch.arange(len(given))
    source = Source(texts=[text], offsets=torch.stack([places, places + 1], dim=-1)[None])
    (row,) = head(labels).decode(types.SimpleNamespace(logits=logits), source, **options)
    return [(span["entity_group"], span["word"]) for span in row]


BILOU = ["O", *(f"{prefix}-{kind}" for kind in "XY" for prefix in "BILU")]
IOBES = ["O", *(f"{prefix}-{kind}" for kind in "XY" for prefix in "BIES")]
SCHEMES: dict[str, tuple[list[str], str, list[tuple[str, str]]]] = {
    "bio": (
        ["O", "B-X", "I-X", "B-Y", "I-Y"],
        "B-X I-X B-X O I-X I-Y B-Y",
        [("X", "ab"), ("X", "c"), ("X", "e"), ("Y", "f"), ("Y", "g")],
    ),
    "io": (["O", "I-X", "I-Y"], "I-X I-X I-Y O I-X", [("X", "ab"), ("Y", "c"), ("X", "e")]),
    "bilou": (
        BILOU,
        "B-X I-X L-X I-X U-X U-X B-Y L-Y L-Y",
        [("X", "abc"), ("X", "d"), ("X", "e"), ("X", "f"), ("Y", "gh"), ("Y", "i")],
    ),
    "iobes": (
        IOBES,
        "S-X B-X E-X I-X E-X B-Y I-X",
        [("X", "a"), ("X", "bc"), ("X", "de"), ("Y", "f"), ("X", "g")],
    ),
    "names that look like prefixes": (
        ["O", "E-mail", "U-turn"],
        "E-mail E-mail U-turn",
        [("E-mail", "ab"), ("U-turn", "c")],
    ),
    "no prefixes": (
        ["NOUN", "VERB"],
        "NOUN NOUN VERB",
        [("NOUN", "ab"), ("VERB", "c")],
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_are_read_off_the_names(scheme: str) -> None:
    labels, given, expected = SCHEMES[scheme]
    assert spans(labels, given.split()) == expected


def test_equal_neighbours_can_stay_apart() -> None:
    labels, given, _ = SCHEMES["no prefixes"]
    apart = [("NOUN", "a"), ("NOUN", "b"), ("VERB", "c")]
    assert spans(labels, given.split(), merge_equal=False) == apart
    bio, given, expected = SCHEMES["bio"]
    assert spans(bio, given.split(), merge_equal=False) == expected


def test_labels_can_be_left_out() -> None:
    labels, given, _ = SCHEMES["bio"]
    assert spans(labels, given.split(), ignore_labels=("O", "X")) == [("Y", "f"), ("Y", "g")]
    assert ("O", "d") in spans(labels, given.split(), ignore_labels=())


def test_spans_stay_in_their_text_and_are_json(read: Any) -> None:
    _, source = read(("Anna", "Anna"), ("New York", "Berlin Berlin"))
    logits = torch.zeros(2, source.input_ids.shape[1], 2)
    logits[..., 1] = 5.0
    found = head(["O", "I-X"]).decode(types.SimpleNamespace(logits=logits), source)
    assert [[span["word"] for span in row] for row in found] == [
        ["Anna", "Anna"],
        ["New York", "Berlin Berlin"],
    ]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(
    pair: tuple[Any, Any], read: Any, wordpieces: Any, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [decode(pair[1], read, text)[0] for text in TEXTS]
    monkeypatch.setattr(wordpieces, "padding_side", side)
    inputs, source = read(*TEXTS)
    positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        found = pair[1].heads["ner"].decode(pair[1](**inputs, position_ids=positions), source)
    for own, other in zip(chain(*found), chain(*expected), strict=True):
        assert own["score"] == pytest.approx(other["score"], abs=1e-5)
        assert own | {"score": 0} == other | {"score": 0}


@pytest.mark.parametrize("aggregation", ["simple", "average", "max"])
def test_a_text_of_no_tokens_has_no_spans(aggregation: str) -> None:
    offsets, words = torch.zeros(1, 2, 2, dtype=torch.long), [[None, None]]
    source = Source(texts=[""], offsets=offsets, word_ids=words)
    output = types.SimpleNamespace(logits=torch.zeros(1, 2, 2))
    assert head(["O", "X"]).decode(output, source, aggregation=aggregation) == [[]]


def test_what_decoding_needs() -> None:
    output = types.SimpleNamespace(logits=torch.zeros(1, 2, 2))
    tagger = head(["O", "X"])
    with pytest.raises(UnsupportedError, match="texts"):
        tagger.decode(output)
    source = Source(texts=["ab"], offsets=torch.tensor([[[0, 1], [1, 2]]]))
    with pytest.raises(UnsupportedError, match="word_ids"):
        tagger.decode(output, source, aggregation="first")
    with pytest.raises(ConfigError, match="aggregation='best'"):
        tagger.decode(output, source, aggregation="best")


WRONG: dict[str, tuple[torch.Tensor, str]] = {
    "longer": (torch.zeros(3, 9, dtype=torch.long), "have 9 in a row, but a row has 7 tokens"),
    "shorter": (torch.zeros(3, 5, dtype=torch.long), "have 5 in a row, but a row has 7 tokens"),
    "rows": (torch.zeros(2, 7, dtype=torch.long), r"shape \(2, 7\), and should have \(3, 7\)"),
    "flat": (torch.zeros(21, dtype=torch.long), r"shape \(21,\), and should have \(3, 7\)"),
    "range": (torch.full((3, 7), 2), "hold 2, but they can be 0 to 1"),
    "negative": (torch.full((3, 7), -1), "hold -1, but"),
    "dtype": (torch.zeros(3, 7), "float32"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_labels_are_refused_before_the_backbone_runs(wrong: str) -> None:
    labels, message = WRONG[wrong]
    model = tiny_model("bert")
    model.add_tagging_head("ner", num_labels=2)
    model.bert.register_forward_pre_hook(lambda *_: pytest.fail("the backbone ran"))
    with pytest.raises(LabelError, match=message):
        model(**tiny_inputs(model.config), labels=labels)
