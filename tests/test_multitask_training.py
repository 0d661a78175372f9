"""Mixed datasets, the collator, metrics and logs of several heads, in the stock Trainer."""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from flexheads import AutoModelWithHeads
from flexheads.errors import ConfigError, LabelError, UnknownNameError
from flexheads.testing import tiny_model
from flexheads.training import (
    LossLog,
    MixedDataset,
    MultiTaskCollator,
    MultiTaskMetrics,
    Task,
    TaskDataset,
    accuracy,
    entity_f1,
    exact_span,
)
from flexheads.training.metrics import entities

# --- mixing -----------------------------------------------------------------------------------


def numbers(count: int) -> list[dict[str, int]]:
    return [{"number": i} for i in range(count)]


SIZES = {"big": 80, "small": 20}
DATA = {name: numbers(count) for name, count in SIZES.items()}


def drawn(mixed: Any) -> list[tuple[str, int]]:
    items = mixed if not isinstance(mixed, MixedDataset) else (mixed[i] for i in range(len(mixed)))
    return [(item["task"], item["number"]) for item in items]


@pytest.mark.parametrize(
    ("sampling", "temperature", "expected"),
    [
        ("proportional", None, {"big": 80, "small": 20}),
        ("temperature", 1.0, {"big": 80, "small": 20}),
        ("temperature", 2.0, {"big": 67, "small": 33}),  # sqrt(80) : sqrt(20) is 2 : 1
        ("uniform", None, {"big": 50, "small": 50}),
        ("round_robin", None, {"big": 50, "small": 50}),
    ],
)
def test_each_task_has_exactly_its_share(
    sampling: Any, temperature: float | None, expected: dict[str, int]
) -> None:
    mixed = MixedDataset(DATA, sampling, temperature=temperature, seed=4)
    found = drawn(mixed)
    assert collections.Counter(task for task, _ in found) == expected == mixed.counts()
    assert sum(mixed.shares.values()) == pytest.approx(1)
    for task, count in expected.items():
        times = collections.Counter(number for name, number in found if name == task)
        # All once before any comes again.
        assert max(times.values()) - min(times.get(i, 0) for i in range(SIZES[task])) <= 1
        assert sum(times.values()) == count


def test_the_same_seed_draws_the_same_and_epochs_differ() -> None:
    one, two, other = (MixedDataset(DATA, "uniform", seed=seed) for seed in (1, 1, 2))
    first = drawn(one)
    assert first == drawn(two) != drawn(other)
    one.set_epoch(1)
    assert drawn(one) != first
    one.set_epoch(0)
    assert drawn(one) == first


def test_what_one_epoch_leaves_out_comes_in_the_next() -> None:
    mixed = MixedDataset(DATA, "uniform", size=80)  # 40 of the 80 big ones
    seen = []
    for epoch in range(2):
        mixed.set_epoch(epoch)
        seen += [number for task, number in drawn(mixed) if task == "big"]
    assert sorted(seen) == list(range(80))


def test_round_robin_takes_turns_in_blocks_in_its_own_order() -> None:
    mixed = MixedDataset(DATA, "round_robin", block=4, size=20)
    tasks = [task for task, _ in drawn(mixed.in_order())]
    assert tasks == (["big"] * 4 + ["small"] * 4) * 2 + ["big"] * 4
    batches = DataLoader(mixed.in_order(), batch_size=4, collate_fn=list)
    assert [{item["task"] for item in batch} for batch in batches] == [
        {"big"}, {"small"}, {"big"}, {"small"}, {"big"},
    ]  # fmt: skip
    # A random sampler keeps the shares and not the order.
    shuffled = [mixed[i]["task"] for i in RandomSampler(mixed)]
    assert sorted(shuffled) == sorted(tasks)
    assert shuffled != tasks


def test_blocks_can_differ_and_are_the_shares_then() -> None:
    mixed = MixedDataset(DATA, "round_robin", block={"big": 1, "small": 3}, size=10)
    assert mixed.shares == {"big": 0.25, "small": 0.75}
    tasks = [task for task, _ in drawn(mixed)]
    assert tasks == ["big", *["small"] * 3] * 2 + ["big", "small"]
    with pytest.raises(ConfigError, match="for all tasks or for each"):
        MixedDataset(DATA, "round_robin", block={"big": 2})


def test_workers_share_the_items_of_an_order() -> None:
    mixed = MixedDataset(DATA, size=10)
    loaded = DataLoader(mixed.in_order(), batch_size=None, num_workers=2)
    assert sorted(drawn(loaded)) == sorted(drawn(mixed))


def test_any_data_with_numbered_items_can_be_mixed() -> None:
    class Squares(Dataset[dict[str, int]]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, int]:
            assert type(index) is int
            return {"number": index**2}

    mixed = MixedDataset({"list": numbers(2), "torch": Squares()})
    assert sorted(drawn(mixed)) == [("list", 0), ("list", 1)] + [("torch", i) for i in (0, 1, 4)]
    assert mixed[np.int64(0)]["task"] in ("list", "torch")
    assert [item["number"] for item in map(mixed.by_task()["torch"].__getitem__, range(3))] == [
        0, 1, 4,
    ]  # fmt: skip


def test_datasets_of_the_datasets_library_can_be_mixed() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(numbers(3))
    assert sorted(drawn(MixedDataset({"a": data}))) == [("a", 0), ("a", 1), ("a", 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "by task"),
        (({"a": []},), "'a' are empty"),
        (({"a": iter([])},), "length is needed"),
        ((DATA, "often"), "sampling='often'"),
        ((DATA, "temperature"), "belong together"),
    ],
)
def test_bad_mixtures_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixedDataset(*arguments)


def test_bad_numbers_and_items_are_refused() -> None:
    for further in ({"temperature": 2.0}, {"size": 0}, {"block": 0}, {"block": 2}):
        with pytest.raises(ConfigError):
            MixedDataset(DATA, "uniform", **further)
    with pytest.raises(ConfigError, match="over 0"):
        MixedDataset(DATA, "temperature", temperature=-1)
    with pytest.raises(ConfigError, match="is of task 'b'"):
        TaskDataset("a", [{"task": "b"}])[0]
    with pytest.raises(ConfigError, match="mappings"):
        TaskDataset("a", [3])[0]


# --- batches ----------------------------------------------------------------------------------

TASKS = ("topic", "ner", "qa", "choice", "price")
PAD = 9


@pytest.fixture
def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": PAD}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", model_input_names=["input_ids", "attention_mask"]
    )


def item(task: str, length: int, first: int = 11, **labels: Any) -> dict[str, Any]:
    return {"task": task, "input_ids": list(range(first, first + length)), **labels}


def items() -> list[dict[str, Any]]:
    return [
        item("ner", 3, labels=[0, 1, -100]),
        item("topic", 5, label=2),
        item("qa", 4, start_positions=1, end_positions=3),
        {"task": "choice", "input_ids": [[21, 22], [23, 24, 25]], "labels": 1},
        item("ner", 4, labels=[1, 1, 0, 0]),
        item("price", 2, labels=0.5),
    ]


def test_rows_are_padded_and_labels_are_by_head(tokenizer: Any) -> None:
    batch = MultiTaskCollator(tokenizer, TASKS)(items())
    lengths = [3, 5, 4, 2, 3, 4, 2]
    mask = [[1] * length + [0] * (5 - length) for length in lengths]
    assert batch["attention_mask"].tolist() == mask
    assert batch["input_ids"].shape == (7, 5)
    assert batch["input_ids"][4].tolist() == [23, 24, 25, PAD, PAD]
    assert [TASKS[i] for i in batch["task"]] == [
        "ner", "topic", "qa", "choice", "choice", "ner", "price",
    ]  # fmt: skip
    labels = batch["labels"]
    assert list(labels) == sorted(TASKS)
    assert labels["ner"].tolist() == [[0, 1, -100, -100, -100], [1, 1, 0, 0, -100]]
    assert labels["topic"].tolist() == [2]
    assert labels["choice"].tolist() == [1]
    assert {k: v.tolist() for k, v in labels["qa"].items()} == {
        "start_positions": [1], "end_positions": [3],
    }  # fmt: skip
    assert labels["price"].dtype == torch.float32


def test_padding_on_the_left_moves_labels_along(tokenizer: Any) -> None:
    tokenizer.padding_side = "left"
    batch = MultiTaskCollator(tokenizer, TASKS, pad_to_multiple_of=4)(items())
    assert batch["input_ids"].shape == (7, 8)
    assert batch["labels"]["ner"].tolist() == [[-100] * 5 + [0, 1, -100], [-100] * 4 + [1, 1, 0, 0]]
    ends = [batch["labels"]["qa"][name] for name in ("start_positions", "end_positions")]
    assert [batch["input_ids"][2][position].item() for position in ends] == [12, 14]


def test_labels_of_the_whole_batch_can_be_cut_into_rows(tokenizer: Any) -> None:
    rows = [one for one in items() if one["task"] != "choice"]
    batch = MultiTaskCollator(tokenizer, TASKS, whole_batch=True)(rows)
    assert batch["labels"]["topic"].tolist() == [-100, 2, -100, -100, -100]
    assert batch["labels"]["ner"].shape == (5, 5)
    assert batch["labels"]["price"].tolist() == [0, 0, 0, 0, 0.5]
    with pytest.raises(ConfigError, match="choices"):
        MultiTaskCollator(tokenizer, TASKS, whole_batch=True)(items())


def test_lists_of_numbers_for_a_row_are_not_those_of_tokens(tokenizer: Any) -> None:
    rows = [item("topic", 3, labels=[1, 0, 1]), item("topic", 3, labels=[0, 0, 1])]
    plain = MultiTaskCollator(tokenizer, TASKS, token_labels={"topic": False})
    longer = [*rows, item("ner", 4, labels=[1] * 4)]
    assert plain(longer)["labels"]["topic"].tolist() == [[1, 0, 1], [0, 0, 1]]
    assert MultiTaskCollator(tokenizer, TASKS)(longer)["labels"]["topic"].shape == (2, 4)


def test_bad_items_are_refused(tokenizer: Any) -> None:
    collate = MultiTaskCollator(tokenizer, TASKS)
    with pytest.raises(ConfigError, match="has no task"):
        collate([{"input_ids": [1]}])
    with pytest.raises(UnknownNameError, match="no task named 'nerd'"):
        collate([item("nerd", 2)])
    with pytest.raises(ConfigError, match="no input_ids"):
        collate([{"task": "ner"}])
    with pytest.raises(LabelError, match="1 of its 2 items"):
        collate([item("topic", 2, labels=1), item("topic", 2)])
    with pytest.raises(LabelError, match="head 'ner'"):
        collate([item("ner", 3, labels=[1, 0, 1]), item("ner", 3, labels=[1, 0])])
    with pytest.raises(LabelError, match="2 labels for 3 tokens"):
        MultiTaskCollator(tokenizer, TASKS, token_labels={"ner": True})(
            [item("ner", 3, labels=[1, 0])]
        )
    with pytest.raises(UnknownNameError):
        MultiTaskCollator(tokenizer, TASKS, token_labels={"nerd": True})
    assert "labels" not in collate([item("ner", 2)])


def test_batches_survive_being_sent_and_cut(tokenizer: Any) -> None:
    utils = pytest.importorskip("accelerate.utils")
    rows = [one for one in items() if one["task"] != "choice"]
    model = with_heads()
    usual = MultiTaskCollator(tokenizer, TASKS)
    with torch.no_grad():
        expected = model(**utils.send_to_device(usual(rows), "cpu", non_blocking=True))
    collate = MultiTaskCollator(tokenizer, TASKS, whole_batch=True)
    with pytest.raises(ConfigError, match=r"set model\.tasks"):
        model(**collate(rows))
    model.tasks = collate.tasks
    # Only tensors can be sent from process to process.
    sent = utils.recursively_apply(torch.clone, collate(rows), error_on_other_type=True)
    with torch.no_grad():
        whole = model(**sent)
        parts = [model(**utils.slice_tensors(sent, part)) for part in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(
        whole["ner"].logits, torch.cat([part["ner"].logits for part in parts])
    )
    assert [part.head_names for part in parts] == [("ner", "topic"), ("ner", "price", "qa")]
    assert parts[0]["topic"].loss == whole["topic"].loss
    torch.testing.assert_close(whole.loss, expected.loss)


# --- the trainer ------------------------------------------------------------------------------


def with_heads() -> Any:
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.add_classification_head("topic", num_labels=3)
    model.add_tagging_head("ner", num_labels=2)
    model.add_qa_head("qa")
    model.add_multiple_choice_head("choice", num_choices=2)
    model.add_classification_head("price", num_labels=1)
    for name in ("topic", "ner"):
        model.add_adapter(name, "lora")
    model.active_head = None
    return model


def dataset(seed: int = 0) -> MixedDataset:
    random = np.random.default_rng(seed)

    def rows(task: str, count: int) -> list[dict[str, Any]]:
        made = []
        for i in range(count):
            length = int(random.integers(3, 7))
            ids = random.integers(10, 50, length).tolist()
            labels: dict[str, Any] = {
                "topic": {"labels": i % 3},
                "ner": {"labels": [i % 2] * length},
                "qa": {"start_positions": 1, "end_positions": 2},
                "choice": {"labels": i % 2},
                "price": {"labels": i / count},
            }[task]
            if task == "choice":
                ids = [ids, ids[::-1]]
            made.append({"input_ids": ids, "idx": f"row {i}", **labels})
        return made

    return MixedDataset({task: rows(task, 6) for task in TASKS}, seed=seed)


METRICS = {
    "topic": accuracy,
    "ner": entity_f1(["O", "B-thing"]),
    "qa": exact_span,
    "choice": accuracy,
    "price": lambda predicted, labels: {"mse": float(((predicted[:, 0] - labels) ** 2).mean())},
}


def trainer_of(model: Any, tokenizer: Any, folder: Path, train: Any, **settings: Any) -> Any:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 10,
            "per_device_eval_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **settings,
        },
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=dataset(1).by_task(),
        data_collator=MultiTaskCollator(tokenizer, TASKS),
        compute_metrics=MultiTaskMetrics(METRICS),
        callbacks=[LossLog()],
    )


@pytest.mark.parametrize("ordered", [False, True], ids=["random", "in_order"])
def test_one_run_trains_and_measures_every_task(
    ordered: bool, tokenizer: Any, tmp_path: Path
) -> None:
    model, train = with_heads(), dataset()
    model.set_loss_weights("learned")
    trainer = trainer_of(model, tokenizer, tmp_path, train.in_order() if ordered else train)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.train()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    for part in (*(f"heads.{t}." for t in TASKS), *(f"loss_weights.{t}." for t in TASKS)):
        assert any(key.startswith(part) for key in changed), part
    for part in ("adapters.topic.", "adapters.ner."):
        assert any(key.startswith(part) for key in changed), part
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4, 6]
    assert {f"weight/{task}" for task in TASKS} <= set(logs[-1])
    assert all(math.isfinite(entry[f"loss/{task}"]) for entry in logs for task in TASKS)
    found = trainer.evaluate()
    expected = {
        "eval_topic_accuracy", "eval_ner_f1", "eval_qa_exact_span", "eval_choice_accuracy",
        "eval_price_mse",
    }  # fmt: skip
    assert expected <= set(found)
    assert {f"eval_{task}_loss" for task in TASKS} <= set(found)


def test_metrics_are_those_of_the_heads_own_rows(tokenizer: Any, tmp_path: Path) -> None:
    model = with_heads()
    trainer = trainer_of(model, tokenizer, tmp_path, dataset())
    collate, data = MultiTaskCollator(tokenizer, TASKS), dataset(1).by_task()
    found = trainer.evaluate()
    model.eval()
    with torch.no_grad():
        batch = collate([data["topic"][i] for i in range(6)])
        output = model(**batch)["topic"]
        right = (output.logits.argmax(-1) == batch["labels"]["topic"]).float().mean().item()
        assert found["eval_topic_accuracy"] == pytest.approx(right)
        batch = collate([data["price"][i] for i in range(6)])
        loss = model(**batch)["price"].loss.item()
        assert found["eval_price_mse"] == pytest.approx(loss, rel=1e-5)


def test_batches_of_several_tasks_are_measured_by_the_names_of_their_heads(
    tokenizer: Any, tmp_path: Path
) -> None:
    model, data = with_heads(), dataset(1)
    apart = trainer_of(model, tokenizer, tmp_path, dataset()).evaluate()
    joining = trainer_of(model, tokenizer, tmp_path, dataset())
    with pytest.raises(ConfigError, match="eval_do_concat_batches=False"):
        joining.evaluate([data.tasks[task][i] for i in range(6) for task in ("ner", "topic")])
    # Each batch of four has rows of other heads than the one before.
    rows = sorted((data[i] for i in range(30)), key=lambda row: len(str(row["input_ids"])))
    settings = {"eval_do_concat_batches": False}
    together = trainer_of(model, tokenizer, tmp_path, dataset(), **settings).evaluate(rows)
    for name in ("topic_accuracy", "ner_f1", "qa_exact_span", "choice_accuracy", "price_mse"):
        assert together[f"eval_{name}"] == pytest.approx(apart[f"eval_{name}"], rel=1e-5), name


def test_a_run_goes_on_from_a_checkpoint_with_its_learned_weights(
    tokenizer: Any, tmp_path: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole, resumed = with_heads(), with_heads()
    for model in (whole, resumed):
        model.set_loss_weights("learned")
    trainer_of(whole, tokenizer, tmp_path, dataset(), **settings).train()
    again = trainer_of(resumed, tokenizer, tmp_path, dataset(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.get_loss_weights() == whole.get_loss_weights()
    assert whole.get_loss_weights() != dict.fromkeys(TASKS, 1.0)
    loaded = AutoModelWithHeads.from_pretrained(tmp_path / "checkpoint-6")
    assert loaded.get_loss_weights() == pytest.approx(whole.get_loss_weights())


def test_mixed_precision_keeps_the_weighted_loss(tokenizer: Any) -> None:
    operations = pytest.importorskip("accelerate.utils.operations")
    model = with_heads()
    model.set_loss_weights({"ner": 0.25, "topic": 3})
    batch = MultiTaskCollator(tokenizer, TASKS)(items())
    output = model(**batch)
    converted = operations.convert_to_fp32(output)
    assert type(converted) is type(output)
    assert torch.equal(converted["loss"], output.loss)
    assert converted.head_names == output.head_names


# --- metrics ----------------------------------------------------------------------------------


class Evaluation:
    def __init__(self, predictions: Any, label_ids: Any) -> None:
        self.predictions, self.label_ids = predictions, label_ids


def test_metrics_that_do_not_fit_are_refused() -> None:
    metrics, logits = MultiTaskMetrics({"a": accuracy, "b": accuracy}), np.zeros((2, 3))
    with pytest.raises(ConfigError, match="not by head"):
        metrics(Evaluation(logits, np.zeros(2)))
    with pytest.raises(ConfigError, match="3 heads predicted"):
        metrics(Evaluation([({"logits": logits},) * 3], [{"a": np.zeros(2), "b": np.zeros(2)}]))
    with pytest.raises(ConfigError, match="rows do not match"):
        metrics(Evaluation({"logits": logits}, {"a": np.zeros(3)}))
    assert metrics(Evaluation({"logits": logits}, {"other": np.zeros(2)})) == {}


def test_heads_that_all_answer_are_told_apart_by_their_order() -> None:
    metrics = MultiTaskMetrics({"a": accuracy, "b": accuracy}, heads=["b", "a"])
    first, second = np.eye(2)[[0, 0]], np.eye(2)[[1, 1]]
    labels = {"a": np.array([1, 1]), "b": np.array([1, 0])}
    found = metrics(Evaluation(({"logits": first}, {"logits": second}), labels))
    assert found == {"a_accuracy": 1.0, "b_accuracy": 0.5}


def test_entities_are_read_as_conll_does() -> None:
    tags = ["B-a", "I-a", "B-a", "O", "I-b", "I-a", "B-b"]
    assert entities(tags) == {("a", 0, 2), ("a", 2, 3), ("b", 4, 5), ("a", 5, 6), ("b", 6, 7)}
    names = ["O", "B-a", "I-a"]
    truth = np.array([[1, 2, 0, 1], [0, 1, -100, -100]])
    said = np.array([[1, 2, 0, 0], [1, 1, 1, 2]])  # right; missed; one at 0 and one at 1
    scores = np.eye(3)[said]
    found = entity_f1(names)(scores, truth)
    assert found == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})


def test_accuracy_and_spans_count_what_counts() -> None:
    logits = np.eye(3)[[0, 1, 2, 1]]
    assert accuracy(logits, np.array([0, 1, 0, -100])) == {"accuracy": pytest.approx(2 / 3)}
    start, end = np.eye(4)[[0, 1, 2]], np.eye(4)[[1, 2, 3]]
    assert exact_span((start, end), (np.array([0, 1, 2]), np.array([1, 0, 3]))) == {
        "exact_span": pytest.approx(2 / 3)
    }


def test_a_task_can_lead_to_another_head(tokenizer: Any) -> None:
    tasks = {"reviews": "topic", "ner": Task(adapter=[])}
    model = with_heads()
    batch = MultiTaskCollator(tokenizer, tasks)(
        [item("reviews", 3, labels=1), item("ner", 2, labels=[0, 1])]
    )
    assert set(batch["labels"]) == {"ner", "topic"} == set(model(**batch).head_names)
