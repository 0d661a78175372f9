"""The page on prediction heads, sentence by sentence: training, files, and deleting."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import flexheads
from flexheads import BertModelWithHeads, Parallel
from flexheads.errors import ConfigError
from flexheads.testing import randomise

from .pages import IDS, logits, prepare

# --- 5: training -----------------------------------------------------------------------------


def test_the_stock_trainer_trains_adapter_and_head_and_nothing_else(
    model: Any, tmp_path: Path, hashed: Callable
) -> None:
    prepare(model, "mrpc", "other")
    model.add_adapter("language", config="houlsby")
    model.train_adapter("mrpc")
    assert (model.active_adapters, model.active_head) == (flexheads.Stack("mrpc"), "mrpc")
    own = {
        n for n, _ in model.named_parameters() if n.startswith(("adapters.mrpc.", "heads.mrpc."))
    }
    assert {n for n, p in model.named_parameters() if p.requires_grad} == own
    before = {key: hashed(tensor) for key, tensor in model.state_dict().items()}

    data = [{"input_ids": IDS[i % 3], "labels": torch.tensor(i % 2)} for i in range(12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        weight_decay=0.1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:5])
    result = trainer.train()
    assert result.training_loss > 0
    after = {key: hashed(tensor) for key, tensor in model.state_dict().items()}
    assert after.keys() == before.keys()
    assert {key for key in after if after[key] != before[key]} == own
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(data[:5]).predictions.shape == (5, 2)


def test_train_adapter_without_a_head_trains_the_active_head(model: Any) -> None:
    model.add_classification_head("topic", num_labels=3)
    model.add_adapter("language", config="pfeiffer")
    model.train_adapter("language")
    trained = {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"language", "topic"}
    model.set_active_adapters(None)
    assert {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad} == trained


# --- 6: adapter and head in files ------------------------------------------------------------

RELOAD = """
import sys, torch, flexheads
model = flexheads.BertModelWithHeads.from_pretrained(sys.argv[1])
name = model.load_adapter(sys.argv[2])
assert model.active_adapters is None and model.active_head is None
model.set_active_adapters(name)
torch.save(model(torch.load(sys.argv[3])).logits, sys.argv[4])
"""


def test_one_call_saves_both_and_a_new_process_loads_both(
    mrpc: Any, backbone_dir: str, tmp_path: Path
) -> None:
    mrpc.add_classification_head("mrpc2", num_labels=5, set_active=False)
    mrpc.save_adapter(str(tmp_path / "to" / "dir"), "mrpc", with_head=True)
    assert sorted(p.name for p in (tmp_path / "to" / "dir").iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
        "head_config.json",
        "model_head.safetensors",
    ]
    torch.save(IDS, tmp_path / "ids.pt")
    paths = [backbone_dir, *(str(tmp_path / name) for name in ("to/dir", "ids.pt", "logits.pt"))]
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(RELOAD), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(mrpc))


@pytest.fixture
def saved(mrpc: Any, tmp_path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """A directory with adapter and head of the name "mrpc", and their logits."""
    directory = str(tmp_path / "saved")
    mrpc.save_adapter(directory, "mrpc", with_head=True)
    return directory, logits(mrpc)


def test_load_as_renames_both(saved: Any, backbone_dir: str) -> None:
    directory, expected = saved
    fresh = BertModelWithHeads.from_pretrained(backbone_dir)
    assert fresh.load_adapter(directory, load_as="new.name", set_active=True) == "new.name"
    assert (list(fresh.adapters), list(fresh.heads)) == (["new.name"], ["new.name"])
    assert fresh.active_adapters == flexheads.Stack("new.name")
    assert fresh.active_head == "new.name"
    assert torch.equal(logits(fresh), expected)
    assert fresh.load_adapter(directory) == "mrpc"
    assert torch.equal(logits(fresh, adapter_names="mrpc", head="mrpc"), expected)


def test_loading_activates_only_when_asked(saved: Any, backbone_dir: str) -> None:
    fresh = BertModelWithHeads.from_pretrained(backbone_dir)
    fresh.add_classification_head("own", num_labels=4)
    fresh.load_adapter(saved[0])
    assert (fresh.active_adapters, fresh.active_head) == (None, "own")
    assert fresh.config.num_labels == 4
    fresh.load_adapter(saved[0], load_as="again", set_active=True)
    assert (fresh.active_adapters, fresh.active_head) == (flexheads.Stack("again"), "again")
    assert fresh.config.num_labels == 2


def test_with_head_false_leaves_the_head_out(
    mrpc: Any, saved: Any, backbone_dir: str, tmp_path: Path
) -> None:
    fresh = BertModelWithHeads.from_pretrained(backbone_dir)
    fresh.load_adapter(saved[0], with_head=False)
    assert (list(fresh.adapters), list(fresh.heads)) == (["mrpc"], [])
    mrpc.save_adapter(tmp_path / "bare", "mrpc", with_head=False)
    assert {p.name for p in (tmp_path / "bare").iterdir()} == {
        "adapter.safetensors",
        "adapter_config.json",
    }
    mrpc.add_adapter("headless", config="pfeiffer")
    mrpc.save_adapter(tmp_path / "headless", "headless", with_head=True)
    assert fresh.load_adapter(tmp_path / "headless", set_active=True) == "headless"
    assert (list(fresh.heads), fresh.active_head) == ([], None)


def test_id2label_replaces_the_saved_labels(saved: Any, backbone_dir: str) -> None:
    fresh = BertModelWithHeads.from_pretrained(backbone_dir)
    fresh.load_adapter(saved[0], id2label={0: "no", 1: "yes"}, set_active=True)
    assert fresh.get_labels() == ["no", "yes"]
    assert fresh.config.id2label == {0: "no", 1: "yes"}
    assert torch.equal(logits(fresh), saved[1])


def test_a_taken_name_needs_overwrite_ok(saved: Any, backbone_dir: str, snapshot: Callable) -> None:
    directory, expected = saved
    fresh = BertModelWithHeads.from_pretrained(backbone_dir)
    fresh.add_adapter("mrpc", config="houlsby")
    before = snapshot(fresh)
    with pytest.raises(ConfigError, match=r"adapter named 'mrpc'.*overwrite_ok=True"):
        fresh.load_adapter(directory)
    assert snapshot(fresh) == before
    fresh.load_adapter(directory, load_as="second")
    fresh.add_tagging_head("third", num_labels=7)
    before = snapshot(fresh)
    with pytest.raises(ConfigError, match=r"head named 'third'.*overwrite_ok=True"):
        fresh.load_adapter(directory, load_as="third")
    assert snapshot(fresh) == before
    fresh.load_adapter(directory, load_as="third", overwrite_ok=True, set_active=True)
    fresh.load_adapter(directory, overwrite_ok=True)
    assert list(fresh.heads) == ["second", "third", "mrpc"]
    for name in fresh.heads:
        assert torch.equal(logits(fresh, adapter_names=name, head=name), expected)


# --- 7: heads alone, and deleting ------------------------------------------------------------


def test_save_head_and_load_head(mrpc: Any, tmp_path: Path, backbone_dir: str) -> None:
    mrpc.save_head(str(tmp_path / "head"), "mrpc")
    assert sorted(p.name for p in (tmp_path / "head").iterdir()) == [
        "head_config.json",
        "model_head.safetensors",
    ]
    fresh = BertModelWithHeads.from_pretrained(backbone_dir)
    assert fresh.load_head(str(tmp_path / "head")) == "mrpc"
    assert fresh.active_head == "mrpc"
    assert torch.equal(logits(fresh), logits(mrpc, adapter_names=[]))
    fresh.load_head(tmp_path / "head", load_as="b", id2label={0: "x", 1: "y"}, set_active=False)
    assert (list(fresh.heads), fresh.active_head) == (["mrpc", "b"], "mrpc")
    assert fresh.get_labels("b") == ["x", "y"]
    with pytest.raises(ConfigError, match="already"):
        fresh.load_head(tmp_path / "head")
    fresh.load_head(tmp_path / "head", overwrite_ok=True)
    fresh.active_head = None
    fresh.active_head = "b"
    fresh.save_head(tmp_path / "active")
    assert fresh.load_head(tmp_path / "active", load_as="c") == "c"
    assert fresh.get_labels("c") == ["x", "y"]


def test_delete_head(model: Any) -> None:
    prepare(model, "a", "b", "c")
    model.delete_head("c")
    assert (list(model.heads), model.active_head) == (["a", "b"], "a")
    model.active_head = ["b", "a"]
    model.delete_head("a")
    assert model.active_head == "b"
    assert model.config.num_labels == 3, "the labels are those of the head that is left"
    assert logits(model).shape == (3, 3)
    assert list(model.config.prediction_heads) == ["b"]
    model.delete_head("b")
    assert (len(model.heads), model.active_head, model.config.prediction_heads) == (0, None, {})
    assert model.active_adapters == flexheads.Stack("a"), "adapters stay as they are"
    assert model(IDS).last_hidden_state.shape == (3, 6, 32)
    model.add_classification_head("b", num_labels=6)
    assert logits(model).shape == (3, 6)


def test_delete_one_head_of_parallel_branches(model: Any) -> None:
    prepare(model, "a", "b")
    model.set_active_adapters(Parallel("a", "b"))
    with torch.no_grad():
        expected = model(IDS)["b"].logits
        model.delete_head("a")
        output = model(IDS)
    assert model.active_head == "b"
    assert list(output) == ["b"]
    assert torch.equal(output["b"].logits, expected)


def test_deleting_a_parallel_adapter_leaves_no_head_bound_to_its_rows(model: Any) -> None:
    prepare(model, "a", "b")
    model.set_active_adapters(Parallel("a", "b"))
    model.delete_adapter("a")
    assert model.active_adapters is None
    assert model.active_head is None
    assert model.heads.keys() == ("a", "b")


@pytest.mark.parametrize("state", ["active", "inactive", "stacked", "parallel", "merged"])
def test_delete_adapter(backbone_dir: str, model: Any, state: str, snapshot: Callable) -> None:
    model.add_classification_head("x", num_labels=3)
    model.add_adapter("kept", config="pfeiffer")
    randomise(model.adapters["kept"], std=0.2)
    before, kept = snapshot(model), logits(model, adapter_names="kept")
    model.add_adapter("gone", config="lora")
    randomise(model.adapters["gone"], std=0.2)
    setups = {"active": "gone", "stacked": ["kept", "gone"], "parallel": Parallel("gone", "kept")}
    if state == "merged":
        model.merge_adapter("gone")
        assert not torch.allclose(logits(model), logits(model, adapter_names="kept"), atol=1e-3)
    else:
        model.set_active_adapters(setups.get(state))
    model.delete_adapter("gone")
    assert snapshot(model) == before
    assert torch.equal(logits(model, adapter_names="kept"), kept)
    plain = BertModelWithHeads.from_pretrained(backbone_dir)(IDS).last_hidden_state
    assert torch.equal(model(IDS, head=[], adapter_names=[]).last_hidden_state, plain)


def test_deleting_an_inactive_adapter_keeps_the_active_one(mrpc: Any, snapshot: Callable) -> None:
    before, expected = snapshot(mrpc), logits(mrpc)
    mrpc.add_adapter("gone", config="houlsby")
    mrpc.delete_adapter("gone")
    assert snapshot(mrpc) == before
    assert torch.equal(logits(mrpc), expected)


def test_deleting_an_adapter_leaves_its_head(mrpc: Any) -> None:
    bare = logits(mrpc, adapter_names=[])
    mrpc.delete_adapter("mrpc")
    assert (list(mrpc.heads), mrpc.active_head, mrpc.active_adapters) == (["mrpc"], "mrpc", None)
    assert mrpc.config.adapters == {}
    assert torch.equal(logits(mrpc), bare)
