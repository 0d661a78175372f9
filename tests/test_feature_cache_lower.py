"""States after frozen lower layers from files: the upper layers train without those below."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from flexheads import LoRAConfig, ModelWithHeads, Parallel, Rows, SeqBnConfig
from flexheads.errors import CheckpointError, ConfigError, UnsupportedError
from flexheads.testing import randomise, tiny_inputs, tiny_model

ABOVE = SeqBnConfig(leave_out=[0])


def items_for(model: ModelWithHeads) -> list[dict[str, Any]]:
    """Items of different lengths, with labels."""
    ids = tiny_inputs(model.config)["input_ids"].tolist()
    rows = [*ids, ids[0][:4], ids[1][:5]]
    return [{"input_ids": row, "labels": number % 2} for number, row in enumerate(rows)]


def build(architecture: str = "bert", **config: Any) -> ModelWithHeads:
    model = tiny_model(architecture, **config)
    model.add_classification_head("one")
    model.add_adapter("one", config=ABOVE)
    randomise(model.adapters, std=0.1)
    randomise(model.heads, std=0.1)
    model.train_adapter("one")
    model.active_head = "one"
    return model.eval()


def without(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "features"}


def batch_of(cache: Any, *numbers: int) -> dict[str, Any]:
    return cache.collator([cache[number] for number in numbers])


class Ran:
    """Counts how often a layer has run."""

    def __init__(self, model: ModelWithHeads, number: int) -> None:
        self.times = 0
        layers = [entry.layer for entry in model._attachment.repeater.entries]
        layers[number].register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.times += 1


def gradients(model: ModelWithHeads, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "deberta-v2", "modernbert"])
def test_outputs_and_gradients_are_those_of_the_whole_model(
    architecture: str, tmp_path: Path
) -> None:
    model = build(architecture)
    cache = model.cached_features(items_for(model), tmp_path / "lower", lower_layers=1)
    below, above = Ran(model, 0), Ran(model, 1)
    batch = batch_of(cache, 3, 0, 1)
    stored = model(**batch).logits
    assert (below.times, above.times) == (0, 1)
    torch.testing.assert_close(stored, model(**without(batch)).logits)
    assert below.times == 1
    mine, whole = gradients(model, batch), gradients(model, without(batch))
    assert list(mine) == list(whole)
    assert any("adapters" in name for name in mine)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, whole[name], msg=name)


def test_images(tmp_path: Path) -> None:
    model = build("vit")
    inputs = tiny_inputs(model.config)
    items = [{name: value[row] for name, value in inputs.items()} for row in range(2)]
    cache = model.cached_features(items, tmp_path / "lower", lower_layers=1)
    batch = batch_of(cache, 1, 0)
    torch.testing.assert_close(model(**batch).logits, model(**without(batch)).logits)


def test_a_choice_is_a_row(tmp_path: Path) -> None:
    model = build()
    model.add_multiple_choice_head("choice", num_choices=2)
    rows = [{"input_ids": [[2, 9, 8, 3], [2, 7, 3]], "labels": 1} for _ in range(2)]
    cache = model.cached_features(rows, tmp_path / "lower", lower_layers=1)
    batch = batch_of(cache, 0, 1)
    assert batch["features"]["after_layer_1"].shape[:2] == (4, 4)
    torch.testing.assert_close(
        model(**batch, head="choice").loss, model(**without(batch), head="choice").loss
    )


def test_adapters_above_may_be_any(tmp_path: Path) -> None:
    """Also several in one batch; what is stored depends on none of them."""
    model = build()
    model.add_adapter("two", config=LoRAConfig(leave_out=[0]))
    randomise(model.adapters, std=0.1)
    cache = model.cached_features(items_for(model), tmp_path / "lower", lower_layers=1)
    batch = batch_of(cache, 0, 1, 2)
    for setup in ("two", ["one", "two"], [], Rows(["two", None, "one"])):
        stored = model(**batch, adapter_names=setup, head="one").logits
        computed = model(**without(batch), adapter_names=setup, head="one").logits
        torch.testing.assert_close(stored, computed)
    with pytest.raises(UnsupportedError, match="repeats the rows"):
        model(**batch, adapter_names=Parallel("one", "two"), head="one")


def test_trained_upper_layers_keep_the_cache_and_changed_lower_ones_do_not(tmp_path: Path) -> None:
    model = build()
    items = items_for(model)
    model.cached_features(items, tmp_path / "lower", lower_layers=1)
    first, second = (entry.layer for entry in model._attachment.repeater.entries)
    with torch.no_grad():
        next(second.parameters()).add_(1)
    below = Ran(model, 0)
    model.cached_features(items, tmp_path / "lower", lower_layers=1)
    assert below.times == 2  # to find out on one item whether it can be left out
    with torch.no_grad():
        next(first.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="other weights"):
        model.cached_features(items, tmp_path / "lower", lower_layers=1)


def test_what_is_refused(tmp_path: Path) -> None:
    model, place = build(), tmp_path / "lower"
    items = items_for(model)
    for count in (0, 2, -1):
        with pytest.raises(ConfigError, match="from 1 to 1"):
            model.cached_features(items, place, lower_layers=count)
    with pytest.raises(ConfigError, match="left out"):
        model.cached_features(items, place, lower_layers=1, what="pooled")
    for config in ("seq_bn", "prompt_tuning", "seq_bn_inv"):
        model.add_adapter(config, config=config)
        with pytest.raises(UnsupportedError, match="leave_out"):
            model.cached_features(items, place, lower_layers=1, adapter_names=config)
    batch = batch_of(model.cached_features(items, place, lower_layers=1), 0, 1)
    with pytest.raises(UnsupportedError, match="acts at"):
        model(**batch, adapter_names="seq_bn")
    model.add_classification_head("low", hidden_layer=1, set_active=False)
    with pytest.raises(UnsupportedError, match="single layers"):
        model(**without(batch), features=batch["features"], head="low")
    with pytest.raises(UnsupportedError, match="output_hidden_states"):
        model(**batch, output_hidden_states=True)
    with pytest.raises(ConfigError, match="collator"):
        model(input_ids=batch["input_ids"][:1], features=batch["features"])
    model.freeze_model(False)
    with pytest.raises(UnsupportedError, match="are trainable"):
        model(**batch)
    with pytest.raises(UnsupportedError, match="cannot begin at a layer"):
        build("albert").cached_features(items, place, lower_layers=1)


def test_what_a_model_does_around_its_first_layer_is_found_out(tmp_path: Path) -> None:
    """DeBERTa's convolution joins what enters the first layer and what leaves it."""
    model = build("deberta-v2", conv_kernel_size=3)
    with pytest.raises(UnsupportedError, match="gives something else"):
        model.cached_features(items_for(model), tmp_path / "lower", lower_layers=1)


def test_other_threads_run_the_whole_model(tmp_path: Path) -> None:
    model = build()
    cache = model.cached_features(items_for(model), tmp_path / "lower", lower_layers=1)
    batch = batch_of(cache, 0, 1)
    whole = without(batch)
    del whole["labels"]
    right = model(**whole, adapter_names=[], head=[]).last_hidden_state
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(model, **batch) for _ in range(40)]
        others = [pool.submit(model, **whole, adapter_names=[], head=[]) for _ in range(40)]
    assert all(torch.equal(other.result().last_hidden_state, right) for other in others)
    assert len({tuple(run.result().logits.flatten().tolist()) for run in runs}) == 1


def test_a_trainer_trains_the_adapter_above(tmp_path: Path) -> None:
    model = build()
    cache = model.cached_features(items_for(model), tmp_path / "lower", lower_layers=1)
    below, before = Ran(model, 0), model.adapters["one"].state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=3,
        learning_rate=0.1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=cache, data_collator=cache.collator).train()
    assert below.times == 0
    now = model.adapters["one"].state_dict()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in now.items())
