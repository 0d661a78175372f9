"""Training for the quickstart: an adapter and a head with the stock Trainer, and the baselines."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quickstart_data import IGNORED, Example, Task, align
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutput

from flexheads import Features

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        adapter: Configuration of the adapters.
        epochs: Passes over the training data with adapter and head.
        seed: Of new weights, dropout and the order of rows.
        max_length: Longest input, in sub-word tokens.
        batch_size: Rows per step.
        learning_rate: Of adapter and head.
        tagging_rate: The same, for tasks that label tokens.
        evaluations: Points of the learning curve.
        head_rates: Learning rates that the head alone may choose from.
        head_epochs: Passes over the training data with the head alone.
    """

    adapter: str = "double_seq_bn"
    epochs: float = 3
    seed: int = 0
    max_length: int = 40
    batch_size: int = 32
    learning_rate: float = 2e-3
    tagging_rate: float = 3e-3
    evaluations: int = 4
    head_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    head_epochs: int = 20


@dataclass(frozen=True)
class Score:
    """What one way of predicting reached on the test data."""

    accuracy: float
    macro_f1: float

    @classmethod
    def of(cls, truth: np.ndarray, predicted: np.ndarray) -> Score:
        """Compares label numbers of any shape; truth of -100 does not count."""
        counts = truth != IGNORED
        truth, predicted = truth[counts], predicted[counts]
        f1 = f1_score(truth, predicted, average="macro", zero_division=0.0)
        return cls(float(accuracy_score(truth, predicted)), float(f1))


@dataclass
class Result:
    """Everything that was measured for one task; scores are of the test data."""

    task: Task
    majority: Score
    head: Score
    adapter: Score
    head_parameters: int
    parameters: int
    truth: np.ndarray
    predicted: np.ndarray
    losses: list[tuple[float, float]] = field(default_factory=list)
    accuracies: list[tuple[float, float]] = field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        """The scores and the counts of trained parameters."""
        ways = {"majority": self.majority, "head alone": self.head, "adapter + head": self.adapter}
        counts = {"head": self.head_parameters, "adapter + head": self.parameters}
        return {way: asdict(score) for way, score in ways.items()} | {"parameters": counts}


# --- from text to rows ------------------------------------------------------------------------


def encode(examples: Sequence[Example], task: Task, tokenizer: Any, max_length: int) -> list[Row]:
    """Rows with ``input_ids``, ``attention_mask`` and ``labels``."""
    texts = [example.text for example in examples]
    encoded = tokenizer(
        texts, truncation=True, max_length=max_length, return_offsets_mapping=task.tagging
    )
    number = {label: index for index, label in enumerate(task.labels)}
    rows = []
    for index, example in enumerate(examples):
        if task.tagging:
            labels: Any = align(encoded["offset_mapping"][index], example.label, number)
        else:
            labels = number[example.label]
        row = {key: encoded[key][index] for key in ("input_ids", "attention_mask")}
        rows.append({**row, "labels": labels})
    return rows


def collator(task: Task, tokenizer: Any) -> Any:
    """What makes a padded batch of rows."""
    kind = DataCollatorForTokenClassification if task.tagging else DataCollatorWithPadding
    return kind(tokenizer)


# --- baselines --------------------------------------------------------------------------------


def majority(train: Sequence[Row], test: Sequence[Row]) -> Score:
    """Always the most frequent label of the training data."""
    labels = np.concatenate([np.ravel(row["labels"]) for row in train])
    (label, _), *_ = Counter(labels[labels != IGNORED].tolist()).most_common(1)
    truth = np.concatenate([np.ravel(row["labels"]) for row in test])
    return Score.of(truth, np.full_like(truth, label))


@torch.no_grad()
def frozen_features(
    model: Any, rows: Sequence[Row], task: Task, tokenizer: Any, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """What a head sees of the bare backbone: one vector and one label for each thing to predict.

    Returns:
        The vectors ``(things, 1, hidden)`` and their labels ``(things,)``.
    """
    model.eval()
    pad, vectors, labels = collator(task, tokenizer), [], []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="  backbone alone", leave=False, dynamic_ncols=True):
        batch = pad([dict(row) for row in rows[start : start + batch_size]]).to(model.device)
        truth = batch.pop("labels").cpu()
        output = model(**batch, adapter_names=[], head=[])
        mask = batch["attention_mask"]
        features = Features(output, pooling=model.spec.pooling, attention_mask=mask)
        hidden = features.hidden if task.tagging else features.pooled()
        counts = truth != IGNORED
        vectors.append(hidden.cpu()[counts])
        labels.append(truth[counts])
    return torch.cat(vectors).unsqueeze(1), torch.cat(labels)


def head_alone(
    model: Any, task: Task, train: Sequence[Row], test: Sequence[Row], tokenizer: Any, s: Settings
) -> tuple[Score, int]:
    """The same head on the frozen backbone, without an adapter.

    The backbone never changes, so it runs once and the head trains on what it gave. Learning rate
    and number of epochs are those that are best on a quarter of the training modules, held out;
    with them the head trains on everything.

    Returns:
        Its score, and the number of its parameters.
    """
    modules = sorted({example.source for example in task.train})
    held_out = set(modules[::4]) if len(modules) > 4 else set()
    held = [
        example.source in held_out if held_out else number % 4 == 0
        for number, example in enumerate(task.train)
    ]
    fit, check = (
        frozen_features(
            model, [r for r, out in zip(train, held, strict=True) if out is part], task, tokenizer
        )
        for part in (False, True)
    )
    whole = tuple(torch.cat(pair) for pair in zip(fit, check, strict=True))
    best = max(
        (_head_score(score, check).accuracy, -epoch, rate)
        for rate in s.head_rates
        for epoch, score in enumerate(_fresh_head(model, task, fit, rate, s), 1)
    )
    _, epochs, rate = best
    heads = list(itertools.islice(_fresh_head(model, task, whole, rate, s), -epochs))
    score = _head_score(heads[-1], frozen_features(model, test, task, tokenizer))
    return score, sum(parameter.numel() for parameter in heads[-1].parameters())


def _fresh_head(
    model: Any, task: Task, data: Sequence[Tensor], rate: float, s: Settings
) -> Iterator[nn.Module]:
    """A new head, after each epoch of its training on vectors and labels."""
    set_seed(s.seed)
    add_head(model, "head alone", task)
    head = model.heads["head alone"].cpu()
    model.delete_head("head alone")
    vectors, labels = data
    for _ in head_epochs(head, vectors, labels, rate, s.head_epochs, 256 if task.tagging else 64):
        yield head


@torch.no_grad()
def _head_score(head: nn.Module, data: Sequence[Tensor]) -> Score:
    vectors, labels = data
    return Score.of(labels.numpy(), head_logits(head, vectors).argmax(-1).numpy())


def head_epochs(
    head: nn.Module, vectors: Tensor, labels: Tensor, rate: float, epochs: int, batch_size: int
) -> Iterator[None]:
    """Trains a head on vectors, and pauses after every epoch."""
    steps = epochs * math.ceil(len(vectors) / batch_size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(epochs):
        head.train()
        for chosen in torch.randperm(len(vectors)).split(batch_size):
            loss = nn.functional.cross_entropy(head_logits(head, vectors[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        head.eval()
        yield


def head_logits(head: nn.Module, vectors: Tensor) -> Tensor:
    """Logits ``(things, labels)`` of vectors ``(things, 1, hidden)``."""
    return head(Features(BaseModelOutput(last_hidden_state=vectors))).logits.flatten(0, -2)


# --- adapter and head -------------------------------------------------------------------------


def add_head(model: Any, name: str, task: Task) -> None:
    """Adds the head that the task needs."""
    add = model.add_tagging_head if task.tagging else model.add_classification_head
    add(name, id2label=dict(enumerate(task.labels)))


class OneBar(ProgressCallback):
    """The Trainer's progress bar, with the latest numbers beside it instead of lines below it."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        self.shown: dict[str, str] = {}
        self.training_bar.set_description("  training")

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No second bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        names = {"loss": "loss", "eval_accuracy": "test accuracy"}
        self.shown |= {names[k]: f"{v:.3f}" for k, v in (logs or {}).items() if k in names}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)


def arguments(settings: Settings, rows: int, folder: Path) -> TrainingArguments:
    """The Trainer's arguments, in transformers 4 and 5; rows of like length share a batch."""
    steps = max(1, math.ceil(rows / settings.batch_size * settings.epochs))
    known = {known.name for known in fields(TrainingArguments)}
    grouped = {"train_sampling_strategy": "group_by_length", "group_by_length": True}
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=settings.learning_rate,
        warmup_steps=steps // 10,
        seed=settings.seed,
        eval_strategy="steps",
        eval_steps=max(1, math.ceil(steps / settings.evaluations)),
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        dataloader_pin_memory=False,
        **{name: value for name, value in grouped.items() if name in known},
    )


def accuracy(prediction: Any) -> dict[str, float]:
    """The Trainer's metric."""
    return {"accuracy": Score.of(prediction.label_ids, prediction.predictions.argmax(-1)).accuracy}


def train_task(model: Any, task: Task, tokenizer: Any, settings: Settings, folder: Path) -> Result:
    """Adds an adapter and a head of the task's name, trains them, and measures all three ways."""
    train, test = (
        encode(part, task, tokenizer, settings.max_length) for part in (task.train, task.test)
    )
    if task.tagging:
        settings = replace(settings, learning_rate=settings.tagging_rate)
    test.sort(key=lambda row: len(row["input_ids"]))  # less padding
    alone, head_parameters = head_alone(model, task, train, test, tokenizer, settings)
    set_seed(settings.seed)
    model.add_adapter(task.name, config=settings.adapter)
    add_head(model, task.name, task)
    model.train_adapter(task.name)
    trainer = Trainer(
        model,
        arguments(settings, len(train), folder),
        data_collator=collator(task, tokenizer),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(OneBar)
    trainer.train()
    output = trainer.predict(test)
    counts = output.label_ids != IGNORED
    truth, predicted = output.label_ids[counts], output.predictions.argmax(-1)[counts]
    history = trainer.state.log_history
    return Result(
        task=task,
        majority=majority(train, test),
        head=alone,
        adapter=Score.of(truth, predicted),
        head_parameters=head_parameters,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        truth=truth,
        predicted=predicted,
        losses=_curve(history, "loss"),
        accuracies=_curve(history, "eval_accuracy"),
    )


def _curve(history: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """Epochs and values of what the Trainer has logged."""
    return [(log["epoch"], log[name]) for log in history if name in log]
