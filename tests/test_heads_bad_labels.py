"""Bad labels, for every type of head: a clear error before the backbone has computed anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from flexheads.errors import ConfigError, FlexheadsError, LabelError, UnsupportedError
from flexheads.heads import PooledHead
from flexheads.plugins import registry, resolve
from flexheads.testing import tiny_inputs, tiny_model

ROWS, LENGTH = 3, 7
LABELS = {"num_labels": 3}
WHOLE = torch.tensor([0, 2, 1])
TOKENS = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 3
FRAMES = torch.arange(ROWS * 18).view(ROWS, 18) % 3
PATCHES = torch.arange(ROWS * 16).view(ROWS, 16) % 8
STARTS = torch.tensor([[1, 3, 5]] * ROWS)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of head: a model that carries it, and labels that are right.

    Attributes:
        labels: Right labels by argument.
        architecture: A model that carries the type.
        config: Its configuration.
        choices: Choices of each example in the input.
        any_number: Labels that may be any whole number of 0 and above.
        fractions: Labels that may be no whole numbers.
        yes_or_no: Labels that may be True or False.
        filled: Labels in which whatever is below 0 fills rows up.
        any_length: Labels that may be longer, because they do not belong to tokens.
    """

    labels: Mapping[str, Tensor]
    architecture: str = "bert"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: int | None = None
    any_number: tuple[str, ...] = ()
    fractions: tuple[str, ...] = ()
    yes_or_no: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    any_length: bool = False


def one(labels: Tensor, *args: Any, **more: Any) -> Kind:
    return Kind({"labels": labels}, *args, **more)


SOUND, IMAGE = "wav2vec2", "vit"
KINDS: dict[str, Kind] = {
    "classification": one(WHOLE, config=LABELS),
    "multilabel_classification": one(
        torch.tensor([[0.0, 1.0, 1.0]] * ROWS),
        config=LABELS,
        fractions=("labels",),
        yes_or_no=("labels",),
    ),
    "regression": one(
        torch.randn(ROWS, 2), config={"num_labels": 2}, fractions=("labels",), yes_or_no=("labels",)
    ),
    "ordinal": one(WHOLE, config=LABELS),
    "embedding": one(torch.tensor([4, 4, 9]), any_number=("labels",)),
    "ranking": one(WHOLE % 2, choices=2),
    "next_sentence": one(WHOLE % 2, config={"num_labels": 2}),
    "multiple_choice": one(WHOLE, choices=3),
    "tagging": one(TOKENS, config=LABELS),
    "crf_tagging": one(TOKENS, config=LABELS),
    "detection": one(TOKENS % 2, yes_or_no=("labels",)),
    "question_answering": Kind(
        {"start_positions": torch.tensor([1, 0, 2]), "end_positions": torch.tensor([3, 0, 2])},
        any_number=("start_positions", "end_positions"),
    ),
    "dependency_parsing": Kind(
        {
            "word_starts": STARTS,
            "labels_arcs": torch.tensor([[0, 1]] * ROWS),
            "labels_rels": torch.tensor([[2, 1]] * ROWS),
        },
        config=LABELS,
        any_number=("word_starts",),
        filled=("word_starts",),
        any_length=True,
    ),
    "span_classification": Kind(
        {"labels": WHOLE[:, None], "spans": torch.tensor([[[1, 2]]] * ROWS)},
        config=LABELS,
        filled=("spans",),
    ),
    "masked_lm": one(TOKENS + 3),
    "causal_lm": one(TOKENS + 3, "gpt2"),
    "seq2seq_lm": one(TOKENS + 3, "bart", any_length=True),
    "late_interaction": one(torch.tensor([4, 4, 9]), any_number=("labels",)),
    "image_classification": one(WHOLE, IMAGE, LABELS),
    "masked_image_tokens": one(PATCHES, "beit", {"vocab_size": 8}, any_length=True),
    "audio_classification": one(WHOLE, SOUND, LABELS),
    "audio_frame_classification": one(FRAMES, SOUND, LABELS, any_length=True),
    "ctc": one(TOKENS % 2 + 1, SOUND, {"vocab_size": 5}, any_length=True),
    "xvector": one(WHOLE, SOUND, LABELS),
}
ELSEWHERE = ("masked_image_modeling",)
"""Types whose labels are masks and pixels, see the tests of images."""


def built(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model with that head and another one, and inputs."""
    kind = KINDS[name]
    model = tiny_model(kind.architecture)
    model.add_head("other", name, **kind.config)
    model.add_head("x", name, **kind.config)
    inputs = tiny_inputs(model.config, batch=ROWS, length=LENGTH)
    inputs.pop("decoder_input_ids", None)
    if kind.choices:
        count = kind.choices
        inputs = {key: value[:, None].repeat(1, count, 1) for key, value in inputs.items()}
    return model, inputs


MODELS: dict[str, Any] = {}


@pytest.fixture
def case(request: pytest.FixtureRequest) -> tuple[Kind, Any, dict[str, Tensor]]:
    """A kind of head, with one model for all tests of it."""
    name = request.param
    if name not in MODELS:
        MODELS[name] = built(name)
    model, inputs = MODELS[name]
    model.active_head = "x"
    return KINDS[name], model, dict(inputs)


each_kind = pytest.mark.parametrize("case", KINDS, indirect=True)


@contextmanager
def refused(model: Any, *errors: type[Exception]) -> Any:
    """Raises one of these errors, and the backbone has computed nothing."""
    calls: list[int] = []
    backbone = model._attachment.backbone
    watched = [backbone, *backbone.children()]
    hooks = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in watched]
    try:
        with pytest.raises(errors or (LabelError,)) as caught:
            yield caught
    finally:
        for hook in hooks:
            hook.remove()
    assert not calls, f"the backbone ran before: {caught.value}"
    assert str(caught.value)


def test_every_type_is_here() -> None:
    assert set(registry().head_types) == {*KINDS, *ELSEWHERE}


@each_kind
def test_right_labels_give_a_loss(case: Any) -> None:
    kind, model, inputs = case
    assert torch.isfinite(model(**inputs, **kind.labels).loss)


# --- rank, rows, kind of numbers, range ------------------------------------------------------


def broken(labels: Tensor, kind: Kind, name: str) -> dict[str, Any]:
    """Labels that cannot be, made of right ones."""
    shape = tuple(labels.shape)
    wrong: dict[str, Any] = {
        "one dimension more": labels.unsqueeze(0),
        "two dimensions more": labels[..., None, None],
        "no dimension": labels.flatten()[0],
        "a row too many": torch.cat([labels, labels[:1]]),
        "a row too few": labels[:-1],
        "no row": labels[:0],
        "complex numbers": labels.to(torch.complex64),
        "a list": labels.tolist(),
        "a text": "yes",
    }
    if len(shape) > 1 and not kind.any_length and name != "spans":
        wrong["longer"] = torch.cat([labels, labels[:, :1]], dim=1)
        wrong["shorter"] = labels[:, :-1]
    if name in kind.fractions:
        wrong["not a number"] = torch.full(shape, torch.inf)
    else:
        wrong["fractions"] = labels + 0.5
        wrong["whole numbers as fractions"] = labels.double()
    if name not in (*kind.fractions, *kind.filled):
        wrong["below"] = labels - 60
    if name not in (*kind.fractions, *kind.yes_or_no):
        wrong["yes or no"] = labels.bool()
    if name not in (*kind.fractions, *kind.any_number):
        wrong["far above"] = labels + 2**40
    return wrong


def first_too_high(kind: Kind, model: Any, name: str) -> int | None:
    """The least number that is no class, where the head counts classes."""
    if name not in ("labels", "labels_rels") or name in (*kind.fractions, *kind.any_number):
        return None
    head = model.heads["x"]
    return kind.choices or len(head.id2label or ()) or max(2, head.num_outputs)


@each_kind
def test_labels_that_cannot_be(case: Any) -> None:
    kind, model, inputs = case
    for name, right in kind.labels.items():
        for what, wrong in broken(right, kind, name).items():
            try:
                with refused(model) as caught:
                    model(**inputs, **{**kind.labels, name: wrong})
            except (Exception, pytest.fail.Exception) as error:
                raise AssertionError(f"{name}, {what}: {error!r}") from error
            assert "'x'" in str(caught.value), f"{name}, {what}: {caught.value}"


@each_kind
def test_the_first_number_that_is_no_class(case: Any) -> None:
    kind, model, inputs = case
    for name, right in kind.labels.items():
        if (limit := first_too_high(kind, model, name)) is None:
            continue
        wrong = right.clone()
        wrong.view(-1)[-1] = limit
        with refused(model) as caught:
            model(**inputs, **{**kind.labels, name: wrong})
        assert str(limit) in str(caught.value)
        assert str(limit - 1) in str(caught.value)


# --- for whom --------------------------------------------------------------------------------


@each_kind
def test_labels_and_no_head(case: Any) -> None:
    kind, model, inputs = case
    model.active_head = None
    usual = {k: v for k, v in kind.labels.items() if k in ("labels", "start_positions")}
    with refused(model) as caught:
        model(**inputs, **(usual or {"labels": STARTS}))
    assert "no head is active" in str(caught.value)
    with refused(model):
        model(**inputs, head=[], **(usual or {"labels": STARTS}))


@each_kind
def test_labels_for_a_head_that_is_not_active(case: Any) -> None:
    kind, model, inputs = case
    for name in ("other", "nobody"):
        with refused(model, FlexheadsError) as caught:
            model(**inputs, labels={name: dict(kind.labels)})
        assert repr(name) in str(caught.value)
        assert "'x'" in str(caught.value)


@each_kind
def test_labels_that_the_head_does_not_read(case: Any) -> None:
    kind, model, inputs = case
    reads = model.heads["x"].label_names
    for name in ("labels", "start_positions", "end_positions"):
        if name in reads:
            continue
        with refused(model) as caught:
            model(**inputs, **kind.labels, **{name: WHOLE})
        assert name in str(caught.value)
        assert reads[0] in str(caught.value)
    with refused(model, FlexheadsError) as caught:
        model(**inputs, labels={"x": {**kind.labels, "lables": WHOLE}})
    assert "lables" in str(caught.value)


@each_kind
def test_labels_of_one_head_beside_those_of_another(case: Any) -> None:
    kind, model, inputs = case
    name, right = next(iter(kind.labels.items()))
    wrong = {**kind.labels, name: right[:-1]}
    given = {"other": dict(kind.labels), "x": wrong}
    with refused(model) as caught:
        model(**inputs, head=["other", "x"], labels=given)
    assert "'x'" in str(caught.value)
    with refused(model) as caught:
        model(**inputs, head=["other", "x"], labels={"other": wrong})
    assert "'other'" in str(caught.value)


def test_labels_by_head_and_others_beside_them() -> None:
    model, inputs = built("tagging")
    model.add_qa_head("qa")
    with refused(model) as caught:
        model(**inputs, head=["x", "qa"], labels={"x": TOKENS}, start_positions=WHOLE)
    assert "start_positions" in str(caught.value)


def test_a_row_that_is_longer_than_the_tokens() -> None:
    for name in ("tagging", "crf_tagging", "detection", "masked_lm"):
        model, inputs = built(name)
        labels = torch.ones(ROWS, LENGTH + 2, dtype=torch.long)
        with refused(model) as caught:
            model(**inputs, labels=labels)
        assert str(LENGTH) in str(caught.value)
        assert str(LENGTH + 2) in str(caught.value)


# --- heads that the model cannot carry -------------------------------------------------------


def test_a_pooler_that_is_not_there(snapshot: Callable[[Any], Any]) -> None:
    model = tiny_model("distilbert")
    before = snapshot(model)
    kinds = {name: resolve(spec.head) for name, spec in registry().head_types.items()}
    pooled = [n for n, kind in kinds.items() if issubclass(kind, PooledHead) and kind.needs is None]
    assert len(pooled) > 5
    for name in pooled:
        own = kinds[name].config_class._default("pooling")
        said_so = [{"pooling": "pooler"}, *([{"use_pooler": True}] if own is None else [])]
        for said in said_so:
            with refused(model, UnsupportedError) as caught:
                model.add_head("x", name, **{**KINDS[name].config, **said})
            assert "pooler" in str(caught.value)
            assert "'x'" in str(caught.value)
    assert snapshot(model) == before


def test_a_pooler_that_was_left_out() -> None:
    kind = type(tiny_model("bert"))
    backbone = kind.backbone_class(tiny_model("bert").config, add_pooling_layer=False)
    model = kind(backbone.config, backbone=backbone)
    with refused(model, UnsupportedError):
        model.add_classification_head("x", use_pooler=True)
    model.add_classification_head("x")
    assert model(**tiny_inputs(model.config)).logits.shape == (ROWS, 2)


def test_a_pooler_that_reads_another_layer(snapshot: Callable[[Any], Any]) -> None:
    model = tiny_model("bert")
    before = snapshot(model)
    for layer in (0, -1, "mix"):
        with refused(model, UnsupportedError) as caught:
            model.add_classification_head("x", use_pooler=True, hidden_layer=layer)
        assert "hidden_layer" in str(caught.value)
    assert snapshot(model) == before


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "bart", "t5", "vit", "wav2vec2"])
def test_a_layer_that_is_not_there(architecture: str, snapshot: Callable[[Any], Any]) -> None:
    model = tiny_model(architecture)
    kind = {"vit": "image_classification"}.get(architecture, "classification")
    inputs = tiny_inputs(model.config)
    output = model(**inputs, output_hidden_states=True)
    before = snapshot(model)  # transformers has put hooks for hidden states in place
    states = output.get("decoder_hidden_states", output.get("hidden_states"))
    count = len(states)
    for layer in (count, -count - 1, 1000):
        with refused(model, ConfigError) as caught:
            model.add_head("x", kind, num_labels=2, hidden_layer=layer)
        assert str(layer) in str(caught.value)
        assert str(count) in str(caught.value)
    assert snapshot(model) == before
    pooled = {} if architecture == "vit" else {"pooling": "mean"}
    for layer in (count - 1, -count):
        model.add_head(f"{layer}", kind, num_labels=2, hidden_layer=layer, **pooled)
        assert model(**inputs).logits.shape[-1] == 2
