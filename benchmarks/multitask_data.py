"""The four tasks of multitask.py: their files, their rows, and how each is measured."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexheads.training import accuracy, entity_f1

Row = dict[str, Any]
LONGEST_ANSWER = 30  # in tokens


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task.

    Attributes:
        name: Its name, and that of its folder.
        train, dev: Its rows, tokenized, with labels.
        add_head: Adds its head to a model.
        metric: Measures predictions of the dev rows.
        shown: The number of the metric that stands for it.
    """

    name: str
    train: list[Row]
    dev: list[Row]
    add_head: Callable[[Any], None]
    metric: Callable[[Any, Any], dict[str, float]]
    shown: str


def load(name: str, data: Path, tokenizer: Any, limit: int | None, seed: int) -> TaskData:
    """Reads a task.

    Args:
        name: One of `TASKS`.
        data: The folder with all data sets.
        tokenizer: The tokenizer.
        limit: Rows to keep of each file, drawn at random; None is all.
        seed: Of that drawing.
    """
    return TASKS[name](data / name, tokenizer, lambda rows: _some(rows, limit, seed))


def _some(rows: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    rows = list(rows)
    return rows if limit is None else random.Random(seed).sample(rows, min(limit, len(rows)))


def _by_length(rows: list[Row]) -> list[Row]:
    """Rows of one length near each other, so that little is padded."""
    return sorted(rows, key=lambda row: len(row["input_ids"]))


# --- sentences --------------------------------------------------------------------------------


def sst2(folder: Path, tokenizer: Any, some: Any) -> TaskData:
    """Whether a sentence of a film review is positive; accuracy."""

    def rows(file: str) -> list[Row]:
        lines = (folder / file).read_text("utf-8").splitlines()[1:]
        pairs = some([line.split("\t", 1) for line in lines])
        return [_encoded(tokenizer, text, 64) | {"labels": int(label)} for label, text in pairs]

    names = {0: "negative", 1: "positive"}
    return TaskData(
        "sst2",
        rows("train.tsv"),
        _by_length(rows("dev.tsv")),
        lambda model: model.add_classification_head("sst2", num_labels=2, id2label=names),
        accuracy,
        "accuracy",
    )


def _encoded(tokenizer: Any, text: str, longest: int) -> Row:
    return dict(tokenizer(text, truncation=True, max_length=longest))


# --- entities ---------------------------------------------------------------------------------


def wnut17(folder: Path, tokenizer: Any, some: Any) -> TaskData:
    """Rare and emerging entities; F1 of whole entities."""
    train, dev = ([*_sentences(folder / file)] for file in ("train.conll", "dev.conll"))
    names = ["O", *sorted({tag for _, tags in train for tag in tags} - {"O"})]
    number = {name: index for index, name in enumerate(names)}

    def rows(sentences: list[tuple[list[str], list[str]]]) -> list[Row]:
        return [_tagged(tokenizer, words, tags, number) for words, tags in some(sentences)]

    return TaskData(
        "wnut17",
        rows(train),
        _by_length(rows(dev)),
        lambda model: model.add_tagging_head(
            "wnut17", num_labels=len(names), id2label=dict(enumerate(names))
        ),
        entity_f1(names),
        "f1",
    )


def _sentences(file: Path) -> Iterator[tuple[list[str], list[str]]]:
    for block in file.read_text("utf-8").strip().split("\n\n"):
        pairs = [line.split("\t") for line in block.splitlines() if "\t" in line]
        yield [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _tagged(tokenizer: Any, words: list[str], tags: list[str], number: dict[str, int]) -> Row:
    """A sentence whose words' first pieces have the label of the word."""
    row = tokenizer(words, is_split_into_words=True, truncation=True, max_length=96)
    labels, before = [], None
    for word in row.word_ids():
        labels.append(-100 if word is None or word == before else number[tags[word]])
        before = word
    return {**row, "labels": labels}


# --- answers ----------------------------------------------------------------------------------


def squad(folder: Path, tokenizer: Any, some: Any) -> TaskData:
    """Answers in a paragraph; the F1 of words that the SQuAD papers define."""

    def rows(file: str) -> list[tuple[Row, str, list[str]]]:
        articles = json.loads((folder / file).read_text("utf-8"))["data"]
        asked = [
            (question, paragraph["context"])
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
        return [_asked(tokenizer, question, context) for question, context in some(asked)]

    dev = sorted(rows("dev.json"), key=lambda found: len(found[0]["input_ids"]))
    name = "squad_xquad_en"
    return TaskData(
        name,
        [row for row, _, _ in rows("train.json")],
        [row for row, _, _ in dev],
        lambda model: model.add_qa_head(name),
        lambda predicted, labels: _answers(predicted, dev, tokenizer),
        "f1",
    )


def _asked(tokenizer: Any, question: Any, context: str) -> tuple[Row, str, list[str]]:
    """The row of a question, its context, and the right answers."""
    row = tokenizer(
        question["question"],
        context,
        truncation="only_second",
        max_length=256,
        return_offsets_mapping=True,
    )
    first = question["answers"][0]
    begin, end = first["answer_start"], first["answer_start"] + len(first["text"])
    offsets, sides = row["offset_mapping"], row.sequence_ids()
    inside = [
        index
        for index, (start, stop) in enumerate(offsets)
        if sides[index] == 1 and start < end and stop > begin
    ]
    whole = bool(inside) and offsets[inside[-1]][1] >= end  # not cut off
    found = {"start_positions": inside[0], "end_positions": inside[-1]} if whole else {}
    row = dict(row) | {"start_positions": 0, "end_positions": 0} | found
    row["sides"] = sides
    return row, context, [answer["text"] for answer in question["answers"]]


def _answers(predicted: Any, dev: Any, tokenizer: Any) -> dict[str, float]:
    """F1 and exact match of the best spans."""
    f1, exact = [], []
    for start, end, (row, context, right) in zip(*predicted, dev, strict=True):
        inside = np.array([side == 1 for side in row["sides"]])
        span = _best_span(start[: len(inside)], end[: len(inside)], inside)
        text = context[row["offset_mapping"][span[0]][0] : row["offset_mapping"][span[1]][1]]
        f1.append(max(_word_f1(text, answer) for answer in right))
        exact.append(max(_words(text) == _words(answer) for answer in right))
    return {"f1": float(np.mean(f1)), "exact": float(np.mean(exact))}


def _best_span(start: Any, end: Any, inside: Any) -> tuple[int, int]:
    """The span of at most `LONGEST_ANSWER` tokens inside the context with the highest score."""
    scores = np.where(inside, start, -np.inf)[:, None] + np.where(inside, end, -np.inf)[None, :]
    allowed = np.triu(np.ones_like(scores), 0) - np.triu(np.ones_like(scores), LONGEST_ANSWER)
    best = np.where(allowed > 0, scores, -np.inf).argmax()
    first, last = np.unravel_index(best, scores.shape)
    return int(first), int(last)


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _word_f1(found: str, right: str) -> float:
    one, two = _words(found), _words(right)
    same = sum((collections.Counter(one) & collections.Counter(two)).values())
    return 2 * same / (len(one) + len(two)) if same else float(one == two)


# --- choices ----------------------------------------------------------------------------------


def commonsense(folder: Path, tokenizer: Any, some: Any) -> TaskData:
    """Everyday questions with five choices; accuracy."""

    def rows(file: str) -> list[Row]:
        lines = (folder / file).read_text("utf-8").splitlines()
        return [_chosen(tokenizer, json.loads(line)) for line in some(lines)]

    name = "commonsense_qa"
    return TaskData(
        name,
        rows("train.jsonl"),
        rows("dev.jsonl"),
        lambda model: model.add_multiple_choice_head(name, num_choices=5),
        accuracy,
        "accuracy",
    )


def _chosen(tokenizer: Any, asked: Any) -> Row:
    choices = asked["choices"]
    questions = [asked["question"]] * len(choices["text"])
    row = tokenizer(questions, choices["text"], truncation=True, max_length=64)
    return {**row, "labels": choices["label"].index(asked["answerKey"])}


TASKS: dict[str, Callable[..., TaskData]] = {
    "sst2": sst2,
    "wnut17": wnut17,
    "squad_xquad_en": squad,
    "commonsense_qa": commonsense,
}
