"""Heads that classify spans of tokens: what stands for a span, which count, which stay."""

from __future__ import annotations

import itertools
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flexheads.errors import ConfigError, LabelError, UnsupportedError
from flexheads.testing import randomise, tiny_inputs, tiny_model

NAMES = {0: "O", 1: "PER", 2: "LOC"}
SPANS = torch.tensor(
    [[[0, 0], [2, 5], [6, 6]], [[1, 3], [-1, -1], [0, 6]], [[0, 1], [2, 2], [-1, -1]]]
)


def model_with(**config: Any) -> Any:
    model = tiny_model("bert")
    model.add_span_classification_head("spans", id2label=NAMES, **config)
    randomise(model.heads["spans"], std=0.3)
    return model


def by_hand(head: Any, hidden: Tensor, begin: int, end: int) -> Tensor:
    """The scores of one span of one row, by the definition."""
    parts = [hidden[begin], hidden[end]]
    if head.config.attention:
        inside = hidden[begin : end + 1]
        weights = torch.stack([head.attention(token)[0] for token in inside]).softmax(dim=0)
        parts.append(sum(w * token for w, token in zip(weights, inside, strict=True)))
    if head.config.width_size:
        parts.append(head.widths.weight[min(end - begin, head.config.max_width - 1)])
    first, last = head.layers.get_submodule("0"), head.layers.get_submodule("1")
    scores: Tensor = last(first(torch.cat(parts)).relu())
    return scores


CONFIGS: list[dict[str, Any]] = [
    {},
    {"attention": False},
    {"width_size": 0},
    {"attention": False, "width_size": 0, "max_width": 1},
    {"max_width": 3, "width_size": 7},
]


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_scores_of_given_spans(config: dict[str, Any]) -> None:
    model = model_with(**config)
    inputs = tiny_inputs(model.config)
    hidden = model(**inputs, head=[]).last_hidden_state
    output = model(**inputs, spans=SPANS)
    assert output.logits.shape == (3, 3, 3)
    for row, spans in enumerate(SPANS.tolist()):
        for number, (begin, end) in enumerate(spans):
            if begin >= 0:
                expected = by_hand(model.heads["spans"], hidden[row], begin, end)
                assert torch.allclose(output.logits[row, number], expected, atol=1e-5)


@torch.no_grad()
def test_all_spans_up_to_a_width() -> None:
    model = model_with(max_width=3)
    inputs = tiny_inputs(model.config)
    hidden = model(**inputs, head=[]).last_hidden_state
    output = model(**inputs)
    assert output.logits.shape == (3, 7 * 3, 3)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    assert min(lengths) < 7
    for row, length in enumerate(lengths):
        found = {tuple(span): at for at, span in enumerate(output.spans[row].tolist())}
        found.pop((-1, -1))
        assert found.keys() == {(b, e) for b in range(length) for e in range(b, min(b + 3, length))}
        for (begin, end), at in found.items():
            assert at == begin * 3 + end - begin
            expected = by_hand(model.heads["spans"], hidden[row], begin, end)
            assert torch.allclose(output.logits[row, at], expected, atol=1e-5)


@torch.no_grad()
def test_what_counts_in_the_loss() -> None:
    model = model_with(max_width=3)
    inputs = tiny_inputs(model.config)
    labels = torch.tensor([[0, 1, 2], [2, 2, 0], [1, -100, 1]])
    output = model(**inputs, spans=SPANS, labels=labels)
    counted = torch.tensor([[True, True, True], [True, False, True], [True, False, False]])
    expected = functional.cross_entropy(output.logits[counted], labels[counted])
    assert torch.allclose(output.loss, expected, atol=1e-6)
    everywhere = torch.randint(0, 3, (3, 7, 3), generator=torch.Generator().manual_seed(0))
    output = model(**inputs, labels=everywhere)
    real = output.spans[..., 0] >= 0
    expected = functional.cross_entropy(output.logits[real], everywhere.flatten(1)[real])
    assert torch.allclose(output.loss, expected, atol=1e-6)
    assert torch.equal(model(**inputs, labels=everywhere.flatten(1)).loss, output.loss)


def test_it_learns_spans() -> None:
    model = model_with(max_width=4).train()
    inputs = tiny_inputs(model.config)
    labels = torch.zeros(3, 7, 4, dtype=torch.long)
    labels[0, 1, 2], labels[1, 4, 0], labels[2, 0, 1] = 1, 2, 1
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    output = model.eval()(**inputs)
    wrong = output.logits.argmax(-1) != labels.flatten(1)
    assert not wrong[output.spans[..., 0] >= 0].any()


def drawn(read: Any, *scored: tuple[int, int, int, float]) -> tuple[Any, Any]:
    """An output in which spans (first, last, label) have a logit, and all others are none."""
    _, source = read(("Anna Smith lives in New York.", "Berlin."))
    assert source.word_ids is not None
    spans = torch.tensor([[list(span[:2]) for span in scored]])
    logits = torch.zeros(1, len(scored), 3)
    for number, (_, _, label, logit) in enumerate(scored):
        logits[0, number, label] = logit
    return types.SimpleNamespace(logits=logits, spans=spans), source


def place(source: Any, word: str, part: int = 0) -> tuple[int, int]:
    """First and last token of a word."""
    text = source.texts[0][part]
    begin, end = text.index(word), text.index(word) + len(word)
    at = [
        index
        for index, (a, b) in enumerate(source.offsets[0].tolist())
        if source.sequence_ids[0][index] == part and begin <= a < b <= end
    ]
    return at[0], at[-1]


def test_the_likelier_of_two_that_overlap_stays(read: Any) -> None:
    _, source = read(("Anna Smith lives in New York.", "Berlin."))
    anna, name = place(source, "Anna"), place(source, "Anna Smith")
    york, berlin = place(source, "New York"), place(source, "Berlin", 1)
    output, source = drawn(
        read,
        (*berlin, 2, 3.0),
        (*anna, 2, 4.0),
        (*name, 1, 6.0),
        (*york, 2, 5.0),
        (york[0], berlin[1], 2, 9.0),  # from one text into the other
        (0, name[1], 1, 9.0),  # over a special token
        (*place(source, "lives"), 0, 9.0),
        (-1, -1, 1, 9.0),
    )
    head = model_with().heads["spans"]
    (found,) = head.decode(output, source)
    assert [(span["entity_group"], span["word"]) for span in found] == [
        ("LOC", "Berlin"),
        ("PER", "Anna Smith"),
        ("LOC", "New York"),
    ]
    assert found[1]["score"] == pytest.approx(float(torch.tensor([0.0, 6.0, 0.0]).softmax(0)[1]))
    assert (found[2]["start"], found[2]["end"]) == (20, 28)
    assert json.loads(json.dumps(found)) == found
    (both,) = head.decode(output, source, overlapping=True)
    assert ("LOC", "Anna") in [(span["entity_group"], span["word"]) for span in both]
    assert len(both) == 4
    (every,) = head.decode(output, source, ignore_labels=("LOC",))
    assert [span["word"] for span in every] == ["Anna Smith", "lives"]
    with pytest.raises(UnsupportedError, match="texts"):
        head.decode(output)


def test_texts_are_samples(wordpieces: Any) -> None:
    model = model_with()
    model.resize_token_embeddings(len(wordpieces))
    texts = ["Anna Smith lives in New York.", "She works."]
    for text, found in zip(texts, model.predict("spans", texts, wordpieces), strict=True):
        assert found
        assert all(span["word"] == text[span["start"] : span["end"]] for span in found)
        ends = [(span["start"], span["end"]) for span in found]
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def test_file(tmp_path: Path) -> None:
    model = model_with(max_width=5, width_size=3, attention=False)
    model.save_head(tmp_path, "spans")
    other = tiny_model("bert")
    other.load_head(tmp_path)
    inputs = tiny_inputs(model.config)
    assert other.heads["spans"].to_dict() == model.heads["spans"].to_dict()
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("field", "value"), [("max_width", 0), ("width_size", -1), ("attention", "yes")]
)
def test_wrong_configurations(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        model_with(**{field: value})


def long(*shape: int, value: int = 0) -> Tensor:
    return torch.full(shape, value)


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "spans": ({"spans": long(3, 4)}, r"spans .* have shape \(3, 4\)"),
    "dtype": ({"spans": SPANS.float()}, "spans .* are torch.float32"),
    "beyond": ({"spans": SPANS + 2}, "reach to 8, but a row has 7 tokens"),
    "backwards": ({"spans": SPANS.flip(-1)}, "span 1 of row 0 ends at 2, before it starts at 5"),
    "labels": ({"spans": SPANS, "labels": long(3, 2)}, r"shape \(3, 2\), and should have \(3, 3\)"),
    "range": ({"spans": SPANS, "labels": long(3, 3, value=3)}, "hold 3, but they can be 0 to 2"),
    "all": ({"labels": long(3, 7, 7)}, r"should have \(3, 7, 8\) or \(3, 56\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_labels_are_refused_before_the_backbone_runs(wrong: str) -> None:
    labels, message = WRONG[wrong]
    model = model_with()
    model.bert.register_forward_pre_hook(lambda *_: pytest.fail("the backbone ran"))
    with pytest.raises(LabelError, match=message):
        model(**tiny_inputs(model.config), **labels)
