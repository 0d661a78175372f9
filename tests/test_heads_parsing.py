"""Dependency parsing: scores and losses by the definition, and trees that are trees."""

from __future__ import annotations

import itertools
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from flexheads.errors import ConfigError, LabelError, UnsupportedError
from flexheads.heads import word_starts_of
from flexheads.heads.trees import best_tree
from flexheads.testing import randomise, tiny_inputs, tiny_model

RELATIONS = dict(enumerate(["root", "nsubj", "obj", "punct"]))
STARTS = torch.tensor([[1, 2, 4, 7], [1, 3, 6, 0], [0, 1, 2, -100]])
ARCS = torch.tensor([[2, 0, 1], [0, 1, 0], [2, 0, -100]])
RELS = torch.tensor([[1, 0, 3], [0, 2, 0], [3, 0, -100]])
LABELS = {"word_starts": STARTS, "labels_arcs": ARCS, "labels_rels": RELS}


def parser(**config: Any) -> Any:
    model = tiny_model("bert", hidden_dropout_prob=0.0)
    model.add_dependency_parsing_head("parser", id2label=RELATIONS, **config)
    randomise(model.heads["parser"], std=0.3)
    return model


def words(row: Tensor, length: int) -> list[tuple[int, int]]:
    """Where the words of a row are, read one number after the other."""
    found: list[tuple[int, int]] = []
    for begin, end in itertools.pairwise(row.tolist()):
        if not 0 <= begin < end <= length:
            break
        found.append((begin, end))
    return found


def by_hand(model: Any, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Scores of arcs and relations of each row, word by word."""
    head, one, found = model.heads["parser"], torch.ones(1), []
    arc, rel = head.biaffine_arcs.weight[0], head.biaffine_rels.weight
    for row, starts in zip(hidden, STARTS, strict=True):
        vectors = [row[begin:end].mean(dim=0) for begin, end in words(starts, len(row))]
        heads = [row[0], *vectors]
        arcs = [[torch.cat([d, one]) @ arc @ h for h in heads] for d in vectors]
        rels = [
            [[torch.cat([d, one]) @ w @ torch.cat([h, one]) for w in rel] for h in heads]
            for d in vectors
        ]
        found.append((torch.tensor(arcs), torch.tensor(rels)))
    return found


@torch.no_grad()
def test_scores_are_biaffine_products_of_means_of_tokens() -> None:
    model = parser()
    inputs = tiny_inputs(model.config)
    output = model(**inputs, word_starts=STARTS)
    hidden = model(**inputs, head=[]).last_hidden_state
    assert output.loss is None
    assert output.arc_preds.shape == (3, 7, 8)
    assert output.rel_preds.shape == (3, 7, 8, 4)
    for row, (arcs, rels) in enumerate(by_hand(model, hidden)):
        count = len(arcs)
        assert count == (3, 2, 2)[row]
        assert torch.allclose(output.arc_preds[row, :count, : count + 1], arcs, atol=1e-5)
        assert torch.allclose(output.rel_preds[row, :count, : count + 1], rels, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("ignored", [False, True])
def test_the_loss_is_that_of_arcs_and_of_relations_to_the_right_heads(ignored: bool) -> None:
    model = parser(ignore_pad_arcs=ignored)
    inputs = tiny_inputs(model.config)
    output = model(**inputs, **LABELS)
    arcs, rels = [], []
    for row, starts in enumerate(STARTS):
        for word in range(len(words(starts, 7))):
            head = int(ARCS[row, word])
            if ignored and head == model.config.pad_token_id:
                continue
            right = output.rel_preds[row, word, head]
            arcs.append(functional.cross_entropy(output.arc_preds[row, word], ARCS[row, word]))
            rels.append(functional.cross_entropy(right, RELS[row, word]))
    assert len(arcs) == (4 if ignored else 7)
    expected = torch.stack(arcs).mean() + torch.stack(rels).mean()
    assert torch.allclose(output.loss, expected, atol=1e-5)


def test_what_fills_the_word_starts_does_not_matter() -> None:
    model = parser()
    inputs = tiny_inputs(model.config)
    expected = model(**inputs, **LABELS).loss
    for fill in (0, -1, -100, 1):
        starts = functional.pad(STARTS, (0, 3), value=fill)
        labels = {name: functional.pad(LABELS[name], (0, 4)) for name in LABELS if "labels" in name}
        assert torch.equal(model(**inputs, word_starts=starts, **labels).loss, expected)


def test_it_learns_a_tree() -> None:
    model = parser().train()
    inputs = tiny_inputs(model.config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**inputs, **LABELS).loss.backward()
        optimizer.step()
    output = model.eval()(**inputs, word_starts=STARTS)
    arcs, rels = output.arc_preds.argmax(-1), output.rel_preds.argmax(-1)
    for row, starts in enumerate(STARTS):
        for word in range(len(words(starts, 7))):
            head = int(ARCS[row, word])
            assert int(arcs[row, word]) == head
            assert int(rels[row, word, head]) == int(RELS[row, word])


def test_the_stock_trainer_trains_it(tmp_path: Path) -> None:
    model = parser()
    columns = {**tiny_inputs(model.config), **LABELS, "not_for_the_model": ARCS}
    rows = [{name: value[row] for name, value in columns.items()} for row in range(3)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        label_names=["word_starts", "labels_arcs", "labels_rels"],
        max_steps=20,
        per_device_train_batch_size=3,
        learning_rate=3e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2


# --- trees --------------------------------------------------------------------------------------


def is_tree(heads: Sequence[int]) -> bool:
    """Whether every word leads to the root."""
    for word in range(1, len(heads) + 1):
        for _ in heads:
            word = heads[word - 1] if word else 0
        if word:
            return False
    return True


def total(scores: Sequence[Sequence[float]], heads: Sequence[int]) -> float:
    return sum(row[head] for row, head in zip(scores, heads, strict=True))


@pytest.mark.parametrize("single_root", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
def test_trees_are_the_best_of_all(count: int, single_root: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    trees = [
        heads
        for heads in itertools.product(range(count + 1), repeat=count)
        if is_tree(heads) and (not single_root or not count or heads.count(0) == 1)
    ]
    # So many labelled trees there are: Cayley's formula.
    wanted = count ** max(count - 1, 0) if single_root else (count + 1) ** max(count - 1, 0)
    assert len(trees) == wanted
    cycles = 0
    for _ in range(40):
        scores = torch.randn(count, count + 1, generator=generator).tolist()
        found = best_tree(scores, single_root)
        best = max(trees, key=lambda heads: total(scores, heads))
        assert tuple(found) == best
        bare = [max({*range(count + 1)} - {w}, key=r.__getitem__) for w, r in enumerate(scores, 1)]
        cycles += not is_tree(bare)
    assert cycles or count < 2  # or the search would have had nothing to do


def test_trees_of_long_sentences_are_trees() -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        # Neighbours attract each other, so that there are cycles inside of cycles.
        scores = torch.randn(80, 81, generator=generator)
        near = (torch.arange(1, 81)[:, None] - torch.arange(81)).abs()
        heads = best_tree((scores - near).tolist())
        assert is_tree(heads)
        assert heads.count(0) == 1


def test_equal_scores_make_a_tree_too() -> None:
    heads = best_tree(torch.zeros(6, 7).tolist())
    assert is_tree(heads)
    assert heads.count(0) == 1


# --- decoding -----------------------------------------------------------------------------------


def test_decoding_gives_a_tree_over_the_words(read: Any) -> None:
    model = parser()
    inputs, source = read("Anna works in Berlin.", "She lives.")
    starts = word_starts_of(source)
    size = {name: value % model.config.vocab_size for name, value in inputs.items()}
    with torch.no_grad():
        output = model(**size, word_starts=starts)
    found = model.heads["parser"].decode(output, source)
    assert [[w["word"] for w in row] for row in found] == [
        ["Anna", "works", "in", "Berlin", "."],
        ["She", "lives", "."],
    ]
    assert json.loads(json.dumps(found)) == found
    assert found == model.heads["parser"].decode(output, source, word_starts=starts)
    for row, text, sentence in zip(range(2), source.texts, found, strict=True):
        heads = [word["head"] for word in sentence]
        count = len(sentence)
        arcs = output.arc_preds[row, :count, : count + 1].softmax(dim=-1)
        rels = output.rel_preds[row].softmax(dim=-1)
        assert heads == best_tree(arcs.log().tolist())
        for number, word in enumerate(sentence):
            assert word["id"] == number + 1
            assert word["word"] == text[word["start"] : word["end"]]
            share, kind = rels[number, word["head"]].max(dim=-1)
            assert word["relation"] == RELATIONS[int(kind)]
            expected = float(arcs[number, word["head"]] * share)
            assert word["score"] == pytest.approx(expected, abs=1e-6)


def test_decoding_repairs_what_is_no_tree(read: Any) -> None:
    _, source = read("Anna works.")
    arcs = torch.zeros(1, source.input_ids.shape[1], source.input_ids.shape[1] + 1)
    arcs[0, 0, 2] = arcs[0, 1, 1] = 9.0  # each of the two is the other's head
    arcs[0, 1, 0] = 3.0
    rels = torch.zeros(*arcs.shape, 4)
    output = types.SimpleNamespace(arc_preds=arcs, rel_preds=rels)
    (found,) = parser().heads["parser"].decode(output, source)
    assert [word["head"] for word in found][:2] == [2, 0]


def test_words_of_pairs(read: Any) -> None:
    _, source = read(("Anna works", "She lives in Berlin"))
    first, second = word_starts_of(source), word_starts_of(source, part=1)
    assert source.word_ids is not None
    assert (first.shape, second.shape) == ((1, 3), (1, 5))
    separator = [number for number, word in enumerate(source.word_ids[0]) if word is None]
    assert (int(first[0, 0]), int(first[0, -1])) == (1, separator[1])
    assert (int(second[0, 0]), int(second[0, -1])) == (separator[1] + 1, separator[2])


def test_lists_of_words_are_samples(wordpieces: Any) -> None:
    model = parser()
    model.resize_token_embeddings(len(wordpieces))
    sentences = [["Anna", "works"], ["United", "Nations", "lives", "since", "1998"]]
    found = model.predict("parser", sentences, wordpieces)
    assert [[word["word"] for word in row] for row in found] == sentences
    assert all(sum(word["head"] == 0 for word in row) == 1 for row in found)
    alone = model.predict("parser", "Anna works", wordpieces)
    assert [word["head"] for word in alone] == [word["head"] for word in found[0]]


# --- files and bad input ------------------------------------------------------------------------


def test_file(tmp_path: Path) -> None:
    model = parser(dropout_prob=0.25, ignore_pad_arcs=True)
    model.save_head(tmp_path, "parser")
    other = tiny_model("bert", seed=1)
    other.load_head(tmp_path)
    assert other.heads["parser"].to_dict() == model.heads["parser"].to_dict()
    assert other.get_labels_dict("parser") == RELATIONS
    for key, tensor in model.heads["parser"].state_dict().items():
        assert torch.equal(other.heads["parser"].state_dict()[key], tensor)
    content = json.loads((tmp_path / "head_config.json").read_text())
    assert content["config"].keys() == {"head_type", "num_labels", "label2id"}


def test_words_are_needed(read: Any) -> None:
    model = parser()
    inputs = tiny_inputs(model.config)
    with pytest.raises(LabelError, match="needs word_starts"):
        model(**inputs)
    with pytest.raises(UnsupportedError, match="word_ids"):
        word_starts_of(None)
    with pytest.raises(ConfigError, match="ignore_pad_arcs=1"):
        parser(ignore_pad_arcs=1)


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "no words": ({"word_starts": None}, "needs word_starts"),  # type: ignore[dict-item]
    "float": ({"word_starts": STARTS.float()}, "word_starts .* are torch.float32"),
    "rows": ({"word_starts": STARTS[:2]}, "word_starts .* have shape"),
    "cut off": ({"word_starts": STARTS + 4}, "word_starts .* hold 8, but a row has 7 tokens"),
    "arcs alone": ({"labels_rels": None}, "got labels_arcs alone"),  # type: ignore[dict-item]
    "head": ({"labels_arcs": ARCS + 2}, "labels_arcs .* hold 4, but they can be 0 to 3"),
    "relation": ({"labels_rels": RELS + 1}, "labels_rels .* hold 4, but they can be 0 to 3"),
    "few": ({"labels_arcs": ARCS[:, :2]}, "have 2 in a row, but a row has 3 words"),
    "dtype": ({"labels_arcs": ARCS.double()}, "float64"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_labels_are_refused_before_the_backbone_runs(wrong: str) -> None:
    changes, message = WRONG[wrong]
    model = parser()
    model.bert.register_forward_pre_hook(lambda *_: pytest.fail("the backbone ran"))
    with pytest.raises(LabelError, match=message):
        model(**tiny_inputs(model.config), **{**LABELS, **changes})
