"""A classification task from a CSV file of the user's own."""

from __future__ import annotations

import csv
import random
from collections import defaultdict
from pathlib import Path

from quickstart_data import DataError, Example, Task

TEST_SHARE = 0.25
MOST_SHOWN = 8


def csv_task(file: Path, text: str, label: str, seed: int = 0) -> Task:
    """Reads a file with one text and one label a row, and splits it at random, label by label.

    A quarter of each label's rows, and at least one, is for the test. Rows without a text or
    without a label are left out.

    Args:
        file: A CSV file in UTF-8, whose first row names the columns.
        text: Column of the texts.
        label: Column of the labels; its name is the task's.
        seed: Of the split.

    Raises:
        DataError: If the file cannot be read, has no such column, or cannot be learnt from.
    """
    examples = read_examples(file, text, label)
    by_label: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[str(example.label)].append(example)
    _check_labels(by_label, file, label)
    generator = random.Random(seed)
    train: list[Example] = []
    test: list[Example] = []
    for name in sorted(by_label):
        rows = by_label[name]
        generator.shuffle(rows)
        count = max(1, round(len(rows) * TEST_SHARE))
        test += rows[:count]
        train += rows[count:]
    questions = tuple(dict.fromkeys(example.text for example in test[:: len(test) // 3 or 1]))[:3]
    return Task(label, tuple(sorted(by_label)), train, test, questions, by_module=False)


def read_examples(file: Path, text: str, label: str) -> list[Example]:
    """The rows of a file that have a text and a label; see `csv_task`."""
    if text == label:
        raise DataError(f"--text and --label both name the column {text!r}; name two columns.")
    examples = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = csv.DictReader(opened, strict=True)
            _check_columns(list(rows.fieldnames or ()), file, text, label)
            for row in rows:
                examples += _example(row, text, label, f"{file}, line {rows.line_num}")
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror}. Check the path given to --data."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 (byte {error.start}). Save it as UTF-8 text."
        ) from error
    except csv.Error as error:
        raise DataError(
            f"{file}, line {rows.line_num}: {error}. Write cells that hold quotes, commas or line "
            "breaks in double quotes."
        ) from error
    if not examples:
        raise DataError(f"{file} has no row with both {text!r} and {label!r}. Add some.")
    return examples


def _example(row: dict[str | None, str | None], text: str, label: str, where: str) -> list[Example]:
    if None in row or row[text] is None or row[label] is None:
        problem = "more cells" if None in row else "fewer cells"
        raise DataError(
            f"{where}: the row has {problem} than the first row of the file. Put cells that hold "
            "commas in double quotes, and separate cells by commas."
        )
    words, name = str(row[text]).strip(), str(row[label]).strip()
    return [Example(words, name, where)] if words and name else []


def _check_columns(columns: list[str], file: Path, text: str, label: str) -> None:
    for option, column in (("--text", text), ("--label", label)):
        if column not in columns:
            known = ", ".join(map(repr, columns)) or "none; the file is empty"
            raise DataError(
                f"{file} has no column {column!r} (columns: {known}). "
                f"Name one of them with {option}."
            )
        if columns.count(column) > 1:
            raise DataError(f"{file} has several columns {column!r}. Rename all but one.")


def _check_labels(by_label: dict[str, list[Example]], file: Path, label: str) -> None:
    if len(by_label) < 2:
        (only,) = by_label
        raise DataError(
            f"{file}: every row has the label {only!r} in column {label!r}. A classifier needs at "
            "least two labels; name another column with --label."
        )
    single = [rows[0] for rows in by_label.values() if len(rows) < 2]
    if single:
        where = [f"{e.label!r} ({e.source.rpartition(', ')[2]})" for e in single[:MOST_SHOWN]]
        more = f" and {len(single) - MOST_SHOWN} more" if len(single) > MOST_SHOWN else ""
        raise DataError(
            f"{file}: {len(single)} of the {len(by_label)} labels in column {label!r} occur only "
            f"once: {', '.join(where)}{more}. Each label needs two rows, one to train on and one "
            "for the test: add rows, remove these, or name another column with --label."
        )
