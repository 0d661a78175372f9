"""Traps: the stock Trainer trains adapters and heads, nothing else, and resumes from files."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import flexheads
from flexheads.testing import randomise, tiny_config, tiny_inputs, tiny_model, tiny_static

from .classifiers import NO_DROPOUT, classifier, each_kind

pytest.importorskip("accelerate")

ROWS, BATCH = 12, 4


class Rows(Dataset[dict[str, Tensor]]):
    """Random rows, each with a label and a column that no model takes."""

    def __init__(self, rows: int = ROWS) -> None:
        inputs = tiny_inputs(tiny_config("bert"), batch=rows, seed=5)
        labels = torch.arange(rows) % 3
        self.rows = [
            {"labels": labels[i], "nobody_takes_this": labels[i]}
            | {name: tensor[i] for name, tensor in inputs.items()}
            for i in range(rows)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def build(kind: str) -> Any:
    """A model without dropout; one adapter is to be trained, another stays as it is."""
    if kind == "flexible":
        model = randomise(tiny_model("bert", **NO_DROPOUT), std=0.1)
        for name in ("other", "task"):
            model.add_classification_head(name, num_labels=3)
            randomise(model.heads[name], std=0.1)
    else:
        model = classifier(kind, **NO_DROPOUT)
    for seed, (name, config) in enumerate({"other": "lora", "task": "houlsby"}.items()):
        model.add_adapter(name, config)
        randomise(model.adapters[name], std=0.1, seed=seed)
    model.train_adapter("task")
    return model


def trainer(model: Any, directory: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        **{
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 11,
            **settings,
        },
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(8))


def digests(model: Any) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def assert_same(found: Any, expected: Any) -> None:
    one, two = found.state_dict(), expected.state_dict()
    assert list(one) == list(two)
    assert not [key for key in two if not torch.equal(one[key], two[key])]


TRAINED = {
    "flexible": ("adapters.task.", "heads.task."),
    "static": ("adapters.task.", "classifier."),
}


@each_kind
def test_training_changes_every_tensor_of_adapter_and_head_and_no_other(
    kind: str, tmp_path: Path
) -> None:
    model = build(kind)
    before = digests(model)
    losses = trainer(model, tmp_path).train().training_loss
    assert math.isfinite(losses)
    after = digests(model)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith(TRAINED[kind])}


@each_kind
def test_label_columns_are_kept_and_others_are_dropped(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    seen: list[set[str]] = []
    model.bert.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
    )
    run = trainer(model, tmp_path, max_steps=1)
    assert run.label_names == ["labels"]
    run.train()
    result = run.evaluate()
    assert math.isfinite(result["eval_loss"])
    predictions = run.predict(Rows(8))
    assert predictions.predictions.shape == (8, 3)
    assert predictions.label_ids.tolist() == [i % 3 for i in range(8)]
    assert not any("nobody_takes_this" in names for names in seen)


@each_kind
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient_checkpointing"])
def test_gradient_accumulation_equals_a_loop_by_hand(
    kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
    }
    model, by_hand = build(kind), build(kind)
    run = trainer(model, tmp_path, gradient_checkpointing=checkpointing, **settings)
    order: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: order.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    run.train()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    rows = {tuple(row["input_ids"].tolist()): row for row in Rows()}
    optimizer = torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], lr=1e-2)
    by_hand.train()
    # A static model is scaled as its transformers class, right or wrong; ours always by the mean.
    bare = tiny_static("BertForSequenceClassification", num_labels=3)
    accepts = kind == "static" and trainer(bare, tmp_path).model_accepts_loss_kwargs
    assert run.model_accepts_loss_kwargs == accepts
    losses = []
    for step in range(3):
        total = 0.0
        for ids in order[2 * step : 2 * step + 2]:
            batch = [rows[tuple(row.tolist())] for row in ids]
            inputs = {
                name: torch.stack([row[name] for row in batch])
                for name in ("input_ids", "attention_mask", "labels")
            }
            loss = by_hand(**inputs).loss / (1 if accepts else 2)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    assert logged == pytest.approx(losses, abs=2e-4)  # the log is rounded
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


@each_kind
def test_resuming_from_a_checkpoint_ends_where_one_run_ends(kind: str, tmp_path: Path) -> None:
    whole = build(kind)
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    trainer(whole, tmp_path / "whole", **settings).train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert checkpoint.is_dir()
    resumed = build(kind)
    with torch.no_grad():  # what the checkpoint has to bring back
        for parameter in resumed.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.5)
    run = trainer(resumed, tmp_path / "resumed", **settings)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 4
    assert_same(resumed, whole)


@each_kind
def test_a_checkpoint_is_a_whole_model(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=4)
    run.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert not (checkpoint / "adapter_config.json").exists()
    loader = {
        "flexible": flexheads.AutoModelWithHeads,
        "static": flexheads.AutoModelForSequenceClassification,
    }
    again = loader[kind].from_pretrained(checkpoint)
    assert_same(again, model)
    assert again.active_adapters == model.active_adapters
    inputs = tiny_inputs(model.config)
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


@each_kind
def test_the_best_model_is_loaded_at_the_end(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    run = trainer(
        model,
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the last is not the best
    )
    run.train()
    evaluations = {
        entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry
    }
    best = max(evaluations, key=evaluations.__getitem__)
    assert len(evaluations) == 4
    assert best != 4
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluations[best], abs=1e-5)


@each_kind
def test_a_trainer_that_checkpoints_activations_trains_every_part(
    kind: str, tmp_path: Path
) -> None:
    plain, checkpointed = build(kind), build(kind)
    trainer(plain, tmp_path / "a").train()
    trainer(checkpointed, tmp_path / "b", gradient_checkpointing=True).train()
    assert_same(checkpointed, plain)
