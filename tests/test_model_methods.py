"""What users call on a model beside adding and saving: summaries, setups, embeddings, moving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flexheads
from flexheads import Average, Fuse, Stack
from flexheads.errors import CheckpointError, ConfigError, UnknownNameError
from flexheads.testing import randomise, tiny_model, tiny_output


class Words:
    """As much of a tokenizer as embeddings need."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}


def test_summary_counts_every_adapter() -> None:
    model = tiny_model("bert")
    model.add_adapter("a")
    model.add_adapter("b", config="lora")
    model.train_adapter("a")
    a, b, whole = model.adapter_summary(as_dict=True)
    assert (a["name"], a["method"], a["active"], a["train"]) == ("a", "bottleneck", True, True)
    assert (b["name"], b["method"], b["active"], b["train"]) == ("b", "lora", False, False)
    assert a["#param"] == sum(p.numel() for p in model.adapters["a"].parameters())
    assert whole["#param"] == sum(p.numel() for p in model.bert.parameters())
    assert a["%param"] == pytest.approx(100 * a["#param"] / whole["#param"])
    model.merge_adapter("b")
    assert model.adapter_summary(as_dict=True)[1]["merged"]


def test_summary_shows_in_a_terminal_and_in_a_notebook() -> None:
    model = tiny_model("bert")
    model.add_adapter("<a>")
    summary = model.adapter_summary()
    assert "Full model" in str(summary)
    assert "<a>" in str(summary)
    assert "<td>&lt;a&gt;</td>" in summary._repr_html_()


def test_an_adapter_moves_alone() -> None:
    model = tiny_model("bert")
    model.add_adapter("a")
    model.adapter_to("a", dtype=torch.float64)
    assert {p.dtype for p in model.adapters["a"].parameters()} == {torch.float64}
    assert model.dtype == torch.float32


@pytest.mark.parametrize("head", [None, "h"])
def test_a_setup_comes_back_from_one_directory(tmp_path: Path, head: str | None) -> None:
    model = tiny_model("bert")
    for name in ("a", "b", "c/d"):
        model.add_adapter(name)
    model.add_adapter_fusion(["a", "b"])
    randomise(model.adapters)
    model.add_classification_head("h", num_labels=3)
    setup = Stack("c/d", Fuse("a", "b"))
    model.set_active_adapters(setup)
    model.active_head = head
    model.save_adapter_setup(tmp_path / "s", setup, head_setup=head)
    other = tiny_model("bert")
    assert other.load_adapter_setup(tmp_path / "s", set_active=True) == (setup, head)
    assert torch.equal(tiny_output(other), tiny_output(model))


def test_a_damaged_setup_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("bert")
    for name in "ab":
        model.add_adapter(name)
    model.save_adapter_setup(tmp_path, Average("a", "b"))
    (tmp_path / "b" / "adapter_config.json").unlink()
    other = tiny_model("bert")
    with pytest.raises(CheckpointError, match="b"):
        other.load_adapter_setup(tmp_path)
    assert not other.adapters
    with pytest.raises(CheckpointError, match="adapter_setup"):
        other.load_adapter_setup(tmp_path / "a")


def test_embeddings_are_added_from_shared_words_and_switched() -> None:
    model = tiny_model("bert", vocab_size=5)
    old = model.get_input_embeddings().weight.detach().clone()
    model.add_embeddings("new", Words("x", "b", "a"), "default", Words(*"abcde"))
    assert (model.active_embeddings, model.config.vocab_size) == ("new", 3)
    new = model.get_input_embeddings().weight
    assert torch.equal(new[1], old[1])
    assert torch.equal(new[2], old[0])
    model.set_active_embeddings("default")
    assert torch.equal(model.get_input_embeddings().weight, old)
    assert set(model.loaded_embeddings) == {"default", "new"}
    model.delete_embeddings("new")
    assert set(model.loaded_embeddings) == {"default"}


def test_adapters_on_embeddings_follow_a_switch() -> None:
    """Trainable tokens sit at the embeddings, and so must sit at those that are in use."""
    model = tiny_model("bert")
    config = flexheads.load_config("trainable_tokens", token_indices=[4, 5])
    model.add_adapter("t", config, set_active=True)
    randomise(model.adapters["t"])
    weight = model.get_input_embeddings().weight.detach().clone()
    before = tiny_output(model)
    model.add_embeddings("copy", Words(*map(str, range(99))))
    model.get_input_embeddings().weight.data.copy_(weight)
    assert torch.equal(tiny_output(model), before)


def test_embeddings_files(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.add_embeddings("new", Words(*map(str, range(99))))
    model.save_embeddings(tmp_path, "new")
    other = tiny_model("bert")
    assert other.load_embeddings(tmp_path, "mine") is None
    assert torch.equal(tiny_output(other), tiny_output(model))
    with pytest.raises(ConfigError, match="already"):
        other.load_embeddings(tmp_path, "mine")
    with pytest.raises(CheckpointError, match="width"):
        tiny_model("bert", hidden_size=64).load_embeddings(tmp_path, "mine")
    with pytest.raises(CheckpointError, match="no embeddings"):
        other.load_embeddings(tmp_path / "none", "x")
    with pytest.raises(UnknownNameError, match="embeddings"):
        other.set_active_embeddings("none")
    with pytest.raises(ConfigError, match="default"):
        other.delete_embeddings("default")
