"""Question-answering heads: which labels they take, and the answers that they find."""

from __future__ import annotations

import itertools
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from flexheads.errors import ConfigError, LabelError, UnsupportedError
from flexheads.heads import Source
from flexheads.testing import tiny_inputs, tiny_model, tiny_static

PAIRS = (
    ("Where does Anna work?", "Anna Smith works in Berlin, Germany, since 1998."),
    ("Where is Acme?", "The headquarters of Acme Corporation are in Germany, 1998 working!"),
    ("Who lives?", "She lives."),
)


@pytest.fixture(scope="module")
def pair(wordpieces: Any) -> tuple[Any, Any]:
    """A static model with random weights, and a flexible one that has the same."""
    size = {"vocab_size": len(wordpieces)}
    static = tiny_static("BertForQuestionAnswering", **size)
    with torch.no_grad():
        static.qa_outputs.weight.mul_(4)
    model = tiny_model("bert", **size)
    model.bert.load_state_dict(static.bert.state_dict(), strict=False)
    for name, unanswerable in (("qa", False), ("qa2", True)):
        model.add_qa_head(name, activation_function=None, unanswerable=unanswerable)
        layer = model.heads[name].layers.get_submodule("0")
        layer.load_state_dict(static.qa_outputs.state_dict())
    return static, model


@torch.no_grad()
def answer(model: Any, read: Any, *pairs: Any, head: str = "qa", **options: Any) -> list[Any]:
    inputs, source = read(*pairs)
    return model.heads[head].decode(model(**inputs, head=head), source, **options)


def same(own: Any, other: Any) -> bool:
    """Whether two answers are the same, up to rounding."""
    score = pytest.approx(other["score"], abs=1e-6, rel=1e-4)
    return own["score"] == score and own | {"score": 0} == other | {"score": 0}


def has_pipeline() -> bool:
    return hasattr(transformers, "QuestionAnsweringPipeline")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not has_pipeline(), reason="this release of transformers has no such pipeline")
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("unanswerable", [False, True])
@pytest.mark.parametrize("length", [1, 4, 15])
def test_answers_are_those_of_the_pipeline(
    pair: tuple[Any, Any],
    wordpieces: Any,
    read: Any,
    align: bool,
    unanswerable: bool,
    length: int,
) -> None:
    """All of them, because the pipeline sums up only those spans that are among the best.

    It also takes the same words in two places for one answer.
    """
    static, model = pair
    pipeline = transformers.QuestionAnsweringPipeline(model=static, tokenizer=wordpieces)
    head = "qa2" if unanswerable else "qa"
    for question, context in PAIRS:
        own = {"max_answer_length": length, "align_to_words": align}
        found = answer(model, read, (question, context), head=head, top_k=999, **own)[0]
        expected = pipeline(
            question=question,
            context=context,
            top_k=999,
            max_answer_len=length,
            handle_impossible_answer=unanswerable,
            align_to_words=align,
        )
        totals = by_text(found)
        # It counts what ends before it begins too, with the score 0.
        others = {a["answer"].lower(): a for a in expected if a["score"] > 0}
        assert totals.keys() == others.keys()
        for own in found:
            other = others[own["answer"].lower()]
            assert totals[own["answer"].lower()] == pytest.approx(other["score"], rel=1e-4)
            if own["score"] == pytest.approx(other["score"], rel=1e-4):  # it is there once only
                assert (own["start"], own["end"]) == (other["start"], other["end"])


def by_text(answers: list[dict[str, Any]]) -> dict[str, float]:
    """The sum of the scores of each answer, wherever it is."""
    totals: dict[str, float] = {}
    for each in answers:
        text = each["answer"].lower()
        totals[text] = totals.get(text, 0.0) + each["score"]
    return totals


def exhaustive(
    start: Tensor, end: Tensor, source: Source, row: int, longest: int
) -> Iterator[tuple[float, int, int]]:
    """The score of every span of a context, by the definition, and its characters."""
    assert source.sequence_ids is not None
    assert source.offsets is not None
    parts = source.sequence_ids[row]
    own = [index for index, part in enumerate(parts) if part == 1]
    inside = [0, *own]
    for first in own:
        for last in own:
            if first <= last < first + longest:
                score = 1.0
                for logits, place in ((start, first), (end, last)):
                    exps = [float(logits[row, index].double().exp()) for index in inside]
                    score *= float(logits[row, place].double().exp()) / sum(exps)
                offsets = source.offsets[row]
                yield score, int(offsets[first, 0]), int(offsets[last, 1])


@pytest.mark.parametrize("longest", [1, 3, 15])
def test_answers_are_those_of_an_exhaustive_search(
    pair: tuple[Any, Any], read: Any, longest: int
) -> None:
    model = pair[1]
    inputs, source = read(*PAIRS)
    with torch.no_grad():
        output = model(**inputs, head="qa")
    found = model.heads["qa"].decode(
        output, source, top_k=1, max_answer_length=longest, align_to_words=False
    )
    for row, (_, context) in enumerate(PAIRS):
        spans = exhaustive(output.start_logits, output.end_logits, source, row, longest)
        score, begin, end = max(spans)
        expected = {"answer": context[begin:end], "score": score, "start": begin, "end": end}
        assert same(found[row][0], expected)


def test_one_answer_or_a_list(pair: tuple[Any, Any], read: Any) -> None:
    best = answer(pair[1], read, *PAIRS)
    several = answer(pair[1], read, *PAIRS, top_k=3)
    assert [row[0] for row in several] == best
    assert all(1 <= len(row) <= 3 for row in several)
    assert all(a["score"] >= b["score"] for row in several for a, b in itertools.pairwise(row))
    assert json.loads(json.dumps(several)) == several
    for row, (_, context) in zip(several, PAIRS, strict=True):
        assert all(each["answer"] == context[each["start"] : each["end"]] for each in row)


def drawn(read: Any, places: dict[int, tuple[float, float]]) -> tuple[Any, Source]:
    """Scores that are 0 but at some positions: (of start, of end)."""
    _, source = read(("Who lives?", "Anna Smith lives in New York."))
    start, end = torch.zeros(2, 1, source.input_ids.shape[1])
    for place, (one, other) in places.items():
        start[0, place], end[0, place] = one, other
    return types.SimpleNamespace(start_logits=start, end_logits=end), source


def context_at(source: Source) -> int:
    assert source.sequence_ids is not None
    return list(source.sequence_ids[0]).index(1)


def test_never_in_the_question_nor_in_special_tokens(pair: tuple[Any, Any], read: Any) -> None:
    _, source = drawn(read, {})
    at = context_at(source)
    length = source.input_ids.shape[1]
    everywhere = {place: (30.0, 30.0) for place in range(length) if not at <= place < length - 1}
    output, source = drawn(read, {**everywhere, at: (2.0, 2.0)})
    found = pair[1].heads["qa"].decode(output, source)[0]
    assert (found["answer"], found["start"]) == ("Anna", 0)


@pytest.mark.parametrize(
    ("first", "threshold", "expected"),
    [
        (5.0, 0.0, "Anna"),
        (7.0, 0.0, ""),
        (7.0, 3.0, "Anna"),
        (7.0, 1.9, ""),
        (5.0, -2.1, ""),
    ],
)
def test_no_answer_where_the_first_token_says_so(
    read: Any, tmp_path: Path, first: float, threshold: float, expected: str
) -> None:
    """The sum of its two scores is compared with that of the best answer, 12 here."""
    model = tiny_model("bert")
    model.add_qa_head("qa", unanswerable=True, null_threshold=threshold)
    model.save_head(tmp_path, "qa")
    other = tiny_model("bert")
    other.load_head(tmp_path)
    _, source = drawn(read, {})
    output, source = drawn(read, {0: (first, first), context_at(source): (6.0, 6.0)})
    options = {"align_to_words": False, "max_answer_length": 1}
    found = other.heads["qa"].decode(output, source, **options)[0]
    assert found["answer"] == expected
    both = other.heads["qa"].decode(output, source, top_k=2, **options)[0]
    assert [each["answer"] for each in both] == sorted(["", "Anna"], key=lambda a: a != expected)
    if not expected:
        assert (found["start"], found["end"]) == (0, 0)
        shares = torch.stack([output.start_logits, output.end_logits])[:, 0].clone()
        shares[:, 1 : context_at(source)] = shares[:, -1:] = -torch.inf
        assert found["score"] == pytest.approx(float(shares.softmax(-1)[:, 0].prod()), abs=1e-6)


def test_what_decoding_needs(pair: tuple[Any, Any], read: Any) -> None:
    output, source = drawn(read, {})
    head = pair[1].heads["qa"]
    with pytest.raises(UnsupportedError, match="texts"):
        head.decode(output)
    for name in ("top_k", "max_answer_length"):
        with pytest.raises(ConfigError, match=f"{name}=0"):
            head.decode(output, source, **{name: 0})


@pytest.mark.parametrize("head", ["qa", "qa2"])
def test_an_empty_text_holds_no_answer(pair: tuple[Any, Any], read: Any, head: str) -> None:
    (found,) = answer(pair[1], read, ("Who lives?", ""), head=head)
    nothing = {"answer": "", "score": 1.0 if head == "qa2" else 0.0, "start": 0, "end": 0}
    assert found == nothing
    assert answer(pair[1], read, ("Who lives?", ""), head=head, top_k=3) == [[nothing]]


@pytest.mark.parametrize(
    ("field", "value"), [("unanswerable", 1), ("null_threshold", "0"), ("null_threshold", 1e999)]
)
def test_wrong_configurations(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        tiny_model("bert").add_qa_head("qa", **{field: value})


START = torch.tensor([0, 3, 400])
WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "negative": (
        {"start_positions": torch.tensor([0, -1, 2]), "end_positions": START},
        "start_positions of head 'qa' hold -1",
    ),
    "shape": (
        {"start_positions": START, "end_positions": torch.zeros(2, dtype=torch.long)},
        r"end_positions of head 'qa' have shape \(2,\), and should have \(3\) or \(3, 1\)",
    ),
    "dtype": ({"start_positions": START.float(), "end_positions": START}, "float32"),
    "alone": ({"start_positions": START}, "need end_positions"),
    "order": (
        {"start_positions": START, "end_positions": torch.tensor([1, 2, 400])},
        "row 1 .* ends at 2, before it starts at 3",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_labels_are_refused_before_the_backbone_runs(wrong: str) -> None:
    labels, message = WRONG[wrong]
    model = tiny_model("bert")
    model.add_qa_head("qa")
    model.bert.register_forward_pre_hook(lambda *_: pytest.fail("the backbone ran"))
    with pytest.raises(LabelError, match=message):
        model(**tiny_inputs(model.config), **labels)


def test_what_does_not_count() -> None:
    """Answers that were cut off, as in transformers, and rows without a label."""
    static = tiny_static("BertForQuestionAnswering")
    model = tiny_model("bert")
    model.bert.load_state_dict(static.bert.state_dict(), strict=False)
    model.add_qa_head("qa", activation_function=None)
    model.heads["qa"].layers.get_submodule("0").load_state_dict(static.qa_outputs.state_dict())
    inputs = tiny_inputs(model.config)
    cut = {"start_positions": START, "end_positions": torch.tensor([2, 400, 400])}
    with torch.no_grad():
        expected = static(**inputs, **{key: value.clone() for key, value in cut.items()}).loss
        assert torch.allclose(model(**inputs, **cut).loss, expected, atol=1e-6)
        none = {key: torch.where(value == 400, -100, value) for key, value in cut.items()}
        assert torch.allclose(model(**inputs, **none).loss, expected, atol=1e-6)
