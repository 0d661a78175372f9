"""What the quickstart shows: a table, readable predictions and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sklearn.metrics import confusion_matrix

if TYPE_CHECKING:
    from quickstart_train import Result

console = Console(highlight=False)

ADAPTER, HEAD, MAJORITY, LOSS, INK = "#0b6e8f", "#d1782c", "#9a9a9a", "#9fbfca", "#333333"
COLOURS = {
    "name": "cyan",
    "keyword": "bold magenta",
    "operator": "white",
    "number": "yellow",
    "string": "green",
    "comment": "bright_black",
}
MOST_LABELS = 20  # in the confusion matrix


def table(results: Sequence[Result]) -> Table:
    """Accuracy and macro-F1 of all three ways of predicting, for every task."""
    shown = Table(title="On the test data", title_justify="left", title_style="bold")
    shown.add_column("task")
    shown.add_column("what is trained")
    for name in ("parameters", "accuracy", "macro-F1"):
        shown.add_column(name, justify="right")
    for result in results:
        rows = (
            ("nothing (majority)", 0, result.majority, ""),
            ("head alone", result.head_parameters, result.head, ""),
            ("adapter + head", result.parameters, result.adapter, "bold"),
        )
        for place, (what, count, score, style) in enumerate(rows):
            numbers = (f"{count:,}", f"{score.accuracy:.1%}", f"{score.macro_f1:.1%}")
            name = "" if place else result.task.name
            shown.add_row(name, what, *numbers, style=style, end_section=place == 2)
    return shown


def show_answers(answers: Sequence[dict[str, Any]]) -> None:
    """Prints the predictions of the mixed batch, one row of the batch after the other."""
    for answer in answers:
        console.print(f"  [bold]{answer['task']}[/bold]", Text(answer["text"]), soft_wrap=True)
        if "pieces" in answer:
            parts = [
                Text.assemble((piece, COLOURS.get(kind, "")), (f"/{kind}", "dim"))
                for piece, kind in answer["pieces"]
            ]
            console.print("   →", Text("  ").join(parts), soft_wrap=True)
        else:
            label, share = answer["label"], answer["probability"]
            console.print("   →", Text(label, "green"), f"({share:.0%})", soft_wrap=True)


# --- picture ----------------------------------------------------------------------------------


def picture(results: Sequence[Result], file: Path) -> None:
    """Writes learning curves of every task, and the confusion matrix of the first one."""
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    style |= {f"{what}.color": INK for what in ("text", "xtick", "ytick")}
    with plt.rc_context(style | {"axes.edgecolor": INK, "axes.labelcolor": INK}):
        figure = plt.figure(figsize=(13, 6.4), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2))
        axes = np.atleast_1d(left.subplots(len(results), 1))
        for axis, result in zip(axes, results, strict=True):
            lines = _curves(axis, result)
        axes[-1].set_xlabel("epochs of training with adapter + head")
        left.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False)
        _confusion(right.subplots(), results[0])
        figure.savefig(file, dpi=130)
        plt.close(figure)


def _curves(axis: Any, result: Result) -> list[Any]:
    """Accuracy on the test data, and the loss on an axis of its own; returns all lines."""
    epochs, values = zip(*result.accuracies, strict=True)
    lines = axis.plot(epochs, values, "o-", color=ADAPTER, label="adapter + head", linewidth=2)
    for score, colour, label in (
        (result.head, HEAD, "head alone"),
        (result.majority, MAJORITY, "majority"),
    ):
        lines.append(axis.axhline(score.accuracy, color=colour, linestyle="--", label=label))
    axis.set_title(f"{result.task.name}: accuracy on the test data", loc="left", weight="bold")
    axis.set_ylim(0, 1.02)
    axis.set_xlim(left=0)
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axis.grid(axis="y", color="#e6e6e6")
    other = axis.twinx()
    epochs, values = zip(*result.losses, strict=True)
    lines += other.plot(epochs, values, color=LOSS, label="loss on the training data (right)")
    other.set_ylim(bottom=0)
    other.tick_params(axis="y", colors=LOSS)
    return lines


def _confusion(axis: Any, result: Result) -> None:
    """Rows are true labels, columns predicted ones; colours are shares of a row."""
    labels = list(result.task.labels)
    counts = confusion_matrix(result.truth, result.predicted, labels=range(len(labels)))
    if len(labels) > MOST_LABELS:
        kept = sorted(np.argsort(-counts.sum(1), kind="stable")[:MOST_LABELS])
        labels, counts = [labels[i] for i in kept], counts[np.ix_(kept, kept)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="GnBu", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.55 else INK
            axis.text(column, row, str(count), ha="center", va="center", color=colour)
    names = [label if len(label) <= 24 else f"{label[:23]}…" for label in labels]
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("predicted with adapter + head")
    axis.set_ylabel("true")
    axis.set_title(f"{result.task.name}: what is taken for what", loc="left", weight="bold")
