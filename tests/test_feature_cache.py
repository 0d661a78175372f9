"""Features of a frozen backbone from files: what they give, what they cost, what is refused."""

from __future__ import annotations

import pickle
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast, DataCollatorWithPadding, Trainer, TrainingArguments

from flexheads import ModelWithHeads, Parallel
from flexheads.errors import CheckpointError, ConfigError, FlexheadsError, UnsupportedError
from flexheads.testing import randomise, tiny_inputs, tiny_model

TOLERANCE = 1e-6
POOLINGS = ("first_token", "last_token", "mean", "max", "attention", "pooler")

Items = list[dict[str, Any]]


def rows(count: int = 7, seed: int = 0, **labels: Any) -> Items:
    """Items of different lengths, with labels."""
    draw = random.Random(seed)
    items = []
    for number in range(count):
        ids = [draw.randrange(3, 99) for _ in range(draw.randrange(3, 9))]
        items.append({"input_ids": ids, "labels": number % 2, "text": "left out", **labels})
    return items


def build(architecture: str = "bert", **config: Any) -> ModelWithHeads:
    model = tiny_model(architecture, **config)
    model.freeze_model()
    return model


def without(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "features"}


def assert_same(model: ModelWithHeads, batch: dict[str, Any], **how: Any) -> None:
    """The output at every position that is no padding, and the loss, are the backbone's."""
    assert "features" in batch
    with torch.no_grad():
        stored, computed = model(**batch, **how), model(**without(batch), **how)
    stored = getattr(stored, "ordered", (stored,))
    computed = getattr(computed, "ordered", (computed,))
    real = batch["attention_mask"].bool() if "attention_mask" in batch else None
    for one, other in zip(stored, computed, strict=True):
        names = [name for name, value in other.items() if isinstance(value, Tensor)]
        assert names == [name for name, value in one.items() if isinstance(value, Tensor)]
        for name in names:
            mine, theirs = one[name], other[name]
            if real is not None and mine.dim() > 1 and mine.shape[:2] == real.shape:
                mine, theirs = mine[real], theirs[real]
            torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def batch_of(cache: Any, *numbers: int) -> dict[str, Any]:
    return cache.collator([cache[number] for number in numbers])


class Counted:
    """Counts how many rows a model's backbone has seen."""

    def __init__(self, model: ModelWithHeads) -> None:
        self.rows = 0
        model.base_model.register_forward_hook(self._count)

    def _count(self, module: Any, args: Any, output: Any) -> None:
        self.rows += output.last_hidden_state.shape[0]


# --- the same as the backbone ------------------------------------------------------------------


def test_heads_give_what_they_give_on_the_backbone(tmp_path: Path) -> None:
    model = build()
    for pooling in POOLINGS:
        model.add_classification_head(pooling, pooling=pooling)
    for name in ("one", "two"):
        model.add_classification_head(name, num_labels=3)
    model.add_multiple_choice_head("choice", num_choices=3)
    randomise(model.heads, std=0.1)
    cache = model.cached_features(rows(), tmp_path / "features", batch_size=3)
    assert len(cache) == 7
    batch = batch_of(cache, 5, 0, 3)
    labels = batch.pop("labels")
    assert labels.tolist() == [1, 0, 1]
    assert_same(model, batch, head=list(model.heads)[:-1])
    assert_same(model, batch, head="first_token", labels=labels)
    assert_same(model, batch, head="choice")


def test_heads_of_tokens_give_what_they_give_on_the_backbone(tmp_path: Path) -> None:
    model = build()
    model.add_tagging_head("tags", num_labels=2)
    model.add_masked_lm_head("words")
    model.add_qa_head("answer")
    randomise(model.heads, std=0.1)
    items = [{**item, "labels": [1] * len(item["input_ids"])} for item in rows()]
    cache = model.cached_features(items, tmp_path / "features", batch_size=4)
    batch = batch_of(cache, 1, 2, 6)
    labels = batch.pop("labels")
    assert (labels == -100).sum() == (batch["attention_mask"] == 0).sum() > 0
    assert_same(model, batch, head="tags", labels=labels)
    assert_same(model, batch, head="words", labels=labels)
    assert_same(model, batch, head="answer")
    alone = batch_of(cache, 4)
    del alone["labels"]
    where = {"start_positions": torch.tensor([0]), "end_positions": torch.tensor([1])}
    assert_same(model, alone, head="answer", **where)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "vit", "roberta"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    model = build(architecture)
    model.add_classification_head("own")
    if architecture in ("gpt2", "llama"):
        model.add_causal_lm_head("words")
    model.active_head = list(model.heads)
    inputs = tiny_inputs(model.config)
    items = [{name: value[row] for name, value in inputs.items()} for row in range(3)]
    cache = model.cached_features(items, tmp_path / "features", batch_size=2)
    assert_same(model, batch_of(cache, 2, 0))


def test_without_a_directory_each_has_a_place_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    model = build()
    model.add_classification_head("topic")
    counted = Counted(model)
    first = model.cached_features(rows())
    assert_same(model, batch_of(first, 0, 3))
    counted.rows = 0
    model.cached_features(rows())  # nothing left to do
    assert counted.rows == 0
    model.cached_features(rows(seed=1))
    assert counted.rows == len(rows())
    assert len(list((tmp_path / "flexheads" / "features").iterdir())) == 2


def test_adapters_take_part(tmp_path: Path) -> None:
    model = build()
    model.add_classification_head("own")
    model.add_masked_lm_head("words")
    for name, config in (("inv", "seq_bn_inv"), ("prompt", "prompt_tuning")):
        model.add_adapter(name, config=config)
        randomise(model.adapters[name], std=0.1)
        model.adapters[name].requires_grad_(False)
        cache = model.cached_features(rows(), tmp_path / name, adapter_names=name)
        for head in ("own", "words"):
            batch = batch_of(cache, 0, 1, 2)
            del batch["labels"]
            assert_same(model, batch, head=head, adapter_names=name)
        with pytest.raises(ConfigError, match="computed with the adapters"):
            model(**batch, head="own", adapter_names=[])


def test_other_layers_need_to_be_stored(tmp_path: Path) -> None:
    model = build()
    model.add_classification_head("lower", hidden_layer=1)
    model.add_classification_head("mixed", hidden_layer="mix", pooling="mean")
    model.add_classification_head("upper")
    randomise(model.heads, std=0.1)
    cache = model.cached_features(rows(), tmp_path / "layers", what="layers")
    batch = batch_of(cache, 3, 4)
    del batch["labels"]
    assert_same(model, batch, head=["lower", "mixed", "upper"])
    cache = model.cached_features(rows(), tmp_path / "hidden")
    with pytest.raises(UnsupportedError, match='what="layers"'):
        model(**batch_of(cache, 0), head="lower")


def test_pooled_vectors_are_enough_for_heads_that_read_them(tmp_path: Path) -> None:
    model = build()
    model.add_classification_head("own")
    model.add_classification_head("mean", pooling="mean", num_labels=3)
    cache = model.cached_features(rows(), tmp_path / "pooled", what="pooled")
    whole = model.cached_features(rows(), tmp_path / "hidden")
    size = [sum(f.stat().st_size for f in (tmp_path / n).iterdir()) for n in ("pooled", "hidden")]
    assert size[0] < size[1] / 2
    batch = batch_of(cache, 0, 1)
    del batch["labels"]
    assert_same(model, batch, head=["own", "mean"])
    assert_same(model, batch_of(whole, 0, 1), head="own")
    model.add_classification_head("max", pooling="max")
    with pytest.raises(UnsupportedError, match="'max' reads other features"):
        model(**batch, head="max")
    model.add_tagging_head("tags")
    with pytest.raises(UnsupportedError, match="'tags' reads more"):
        model.cached_features(rows(), tmp_path / "more", what="pooled")
    with pytest.raises(UnsupportedError, match="'tags' reads other features"):
        model(**batch, head="tags")


def test_choices_of_different_lengths(tmp_path: Path) -> None:
    model = build()
    model.add_multiple_choice_head("choice", num_choices=None)
    randomise(model.heads, std=0.1)
    draw = random.Random(0)
    items = [
        {
            "input_ids": [[draw.randrange(3, 99) for _ in range(3 + n)] for n in range(4)],
            "labels": 2,
        }
        for _ in range(3)
    ]
    items[1]["input_ids"][0] += [5] * 6
    cache = model.cached_features(items, tmp_path / "features", batch_size=2)
    batch = batch_of(cache, 0, 1, 2)
    assert batch["input_ids"].shape == (3, 4, 9)
    stored, computed = model(**batch), model(**without(batch))
    torch.testing.assert_close(stored.logits, computed.logits, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(stored.loss, computed.loss)


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")  # of transformers
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_pads_on_its_side(side: str, tmp_path: Path) -> None:
    words = tmp_path / "vocab.txt"
    words.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(90))])
    )
    tokenizer = BertTokenizerFast(str(words), padding_side=side)
    model = build()
    for pooling in ("mean", "last_token"):
        model.add_classification_head(pooling, pooling=pooling)
    items = [{**item, "attention_mask": [1] * len(item["input_ids"])} for item in rows()]
    collator = DataCollatorWithPadding(tokenizer)
    plain = [{k: v for k, v in item.items() if k != "text"} for item in items]
    cache = model.cached_features(plain, tmp_path / "features", batch_size=4, collator=collator)
    batch = batch_of(cache, 0, 1, 2, 3)
    assert batch["attention_mask"].min() == 0
    assert_same(model, batch, head=["mean", "last_token"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build().to(dtype)
    model.add_classification_head("own")
    cache = model.cached_features(rows(3), tmp_path / "features", batch_size=1)
    found = cache[1]["features"]["last_hidden_state"]
    assert found.dtype == dtype
    ids = torch.tensor([rows(3)[1]["input_ids"]])
    with torch.no_grad():
        own = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(found, own.last_hidden_state)


# --- once --------------------------------------------------------------------------------------


def test_features_are_computed_once(tmp_path: Path) -> None:
    model = build()
    model.add_classification_head("own")
    counted = Counted(model)
    model.train()
    cache = model.cached_features(rows(), tmp_path / "features")
    assert (counted.rows, model.training, model.base_model.training) == (7, True, True)
    again = model.cached_features(rows(), tmp_path / "features")
    assert counted.rows == 7
    assert torch.equal(
        again[3]["features"]["last_hidden_state"], cache[3]["features"]["last_hidden_state"]
    )
    batch = batch_of(cache, 0, 1)
    model(**batch).loss.backward()
    assert counted.rows == 7
    assert all(p.grad is not None for p in model.heads.parameters())
    assert all(p.grad is None for p in model.base_model.parameters())


KILLED = """
import os, sys, torch
from flexheads.testing import tiny_model
sys.path.insert(0, sys.argv[1])
from test_feature_cache import build, rows

model = build()
calls = 0

def die(module, args, output):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), 9)

model.base_model.register_forward_hook(die)
model.cached_features(rows(11), sys.argv[2], batch_size=2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_a_killed_process_is_gone_on_from(tmp_path: Path) -> None:
    place = tmp_path / "features"
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(KILLED),
        str(Path(__file__).parent),
        str(place),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with (place / "last_hidden_state.bin").open("ab") as file:
        file.write(b"half a row")
    with (place / "rows.bin").open("ab") as file:
        file.write(b"half a record")
    model = build()
    counted = Counted(model)
    cache = model.cached_features(rows(11), place, batch_size=2)
    assert counted.rows == 11 - 4
    model.add_classification_head("own")
    assert_same(model, batch_of(cache, *range(11)))
    whole = model.cached_features(rows(11), tmp_path / "whole", batch_size=2)
    for name in ("last_hidden_state.bin", "rows.bin"):
        assert (place / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(whole) == 11


def test_an_exception_leaves_what_was_done(tmp_path: Path) -> None:
    class Failing(list[Any]):
        def __getitem__(self, number: Any) -> Any:
            if number == 5:
                raise KeyboardInterrupt
            return super().__getitem__(number)

    model = build()
    with pytest.raises(KeyboardInterrupt):
        model.cached_features(Failing(rows()), tmp_path / "features", batch_size=2)
    counted = Counted(model)
    assert len(model.cached_features(rows(), tmp_path / "features")) == 7
    assert counted.rows == 7 - 4


def test_more_rows_are_added_to_those_there(tmp_path: Path) -> None:
    model = build()
    model.cached_features(rows(9)[:4], tmp_path / "features")
    counted = Counted(model)
    cache = model.cached_features(rows(9), tmp_path / "features")
    assert (len(cache), counted.rows) == (9, 5)
    with pytest.raises(CheckpointError, match="has 9 rows, but the data set has 4"):
        model.cached_features(rows(9)[:4], tmp_path / "features")


def test_labels_may_change(tmp_path: Path) -> None:
    model = build()
    model.cached_features(rows(), tmp_path / "features")
    counted = Counted(model)
    cache = model.cached_features(rows(labels=5), tmp_path / "features")
    assert (counted.rows, cache[0]["labels"]) == (0, 5)
    assert "text" not in cache[0]


def test_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build()
    model.cached_features(rows(), tmp_path / "features", progress=True)
    assert "7/7" in capsys.readouterr().err
    model.cached_features(rows(), tmp_path / "quiet", progress=False)
    assert not capsys.readouterr().err


# --- loaders and trainers ----------------------------------------------------------------------


def test_workers_of_a_loader_and_pickles_read_the_files(tmp_path: Path) -> None:
    model = build()
    model.add_classification_head("own")
    cache = model.cached_features(rows(), tmp_path / "features")
    first = cache[2]["features"]["last_hidden_state"]
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again[2]["features"]["last_hidden_state"], first)
    loader = DataLoader(cache, batch_size=3, collate_fn=cache.collator, num_workers=1)
    batches = list(loader)
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 1]
    assert_same(model, batches[1])


def test_writing_to_an_item_changes_no_file(tmp_path: Path) -> None:
    model = build()
    cache = model.cached_features(rows(), tmp_path / "features")
    before = (tmp_path / "features" / "last_hidden_state.bin").read_bytes()
    cache[0]["features"]["last_hidden_state"].zero_()
    assert (tmp_path / "features" / "last_hidden_state.bin").read_bytes() == before


def test_a_stock_trainer_trains_a_head_without_the_backbone(tmp_path: Path) -> None:
    def trained(cached: bool) -> tuple[Any, int, float]:
        torch.manual_seed(0)
        model = build(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model.add_classification_head("own", dropout_prob=0.0)
        cache = model.cached_features(rows(12), tmp_path / "features", batch_size=5)
        counted = Counted(model)
        plain: Any = cache.collator if cached else (lambda items: without(cache.collator(items)))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            num_train_epochs=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=cache,
            eval_dataset=cache,
            data_collator=plain,
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        return model.heads["own"].state_dict(), counted.rows, loss

    stored, seen, loss = trained(cached=True)
    computed, seen_computed, loss_computed = trained(cached=False)
    assert (seen, seen_computed) == (0, 4 * 12)
    assert loss == pytest.approx(loss_computed, abs=1e-5)
    for name in computed:
        torch.testing.assert_close(stored[name], computed[name], atol=1e-5, rtol=1e-5)


# --- what is refused ---------------------------------------------------------------------------


def test_what_is_trainable_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.add_classification_head("own")
    with pytest.raises(UnsupportedError, match="freeze_model"):
        model.cached_features(rows(), tmp_path / "features")
    model.freeze_model()
    model.add_adapter("topic")
    with pytest.raises(UnsupportedError, match=r"adapters\['topic'\] is trainable"):
        model.cached_features(rows(), tmp_path / "features", adapter_names="topic")
    model.adapters["topic"].requires_grad_(False)
    batch = batch_of(model.cached_features(rows(), tmp_path / "features", adapter_names="topic"), 0)
    model.train_adapter("topic")
    model.active_head = "own"
    model.train()
    with pytest.raises(UnsupportedError, match="is trainable"):
        model(**batch)
    with torch.no_grad():  # nothing is trained here
        model(**batch)


def _other_weight(model: ModelWithHeads) -> None:
    with torch.no_grad():
        next(model.base_model.parameters()).add_(1e-3)


def _other_setting(model: ModelWithHeads) -> None:
    model.config.hidden_act = "relu"


def _other_adapter(model: ModelWithHeads) -> None:
    model.add_adapter("topic", set_active=True)
    model.adapters["topic"].requires_grad_(False)


@pytest.mark.parametrize("change", [_other_weight, _other_setting, _other_adapter])
def test_features_of_another_model_are_refused(change: Any, tmp_path: Path) -> None:
    model = build()
    model.cached_features(rows(), tmp_path / "features")
    files = {path: path.read_bytes() for path in (tmp_path / "features").iterdir()}
    change(model)
    with pytest.raises(CheckpointError, match=r"other (weights|adapters)"):
        model.cached_features(rows(), tmp_path / "features")
    assert {path: path.read_bytes() for path in (tmp_path / "features").iterdir()} == files


def test_heads_and_idle_adapters_make_no_difference(tmp_path: Path) -> None:
    model = build()
    model.cached_features(rows(), tmp_path / "features")
    model.add_classification_head("later", id2label={0: "no", 1: "yes"})
    model.add_adapter("idle")
    counted = Counted(model)
    model.cached_features(rows(), tmp_path / "features")
    assert not counted.rows


def test_other_inputs_and_other_kinds_are_refused(tmp_path: Path) -> None:
    model = build()
    model.cached_features(rows(), tmp_path / "features")
    items = rows()
    items[4]["input_ids"][1] += 1
    with pytest.raises(CheckpointError, match="other inputs: those of row 4"):
        model.cached_features(items, tmp_path / "features")
    with pytest.raises(CheckpointError, match="other kind"):
        model.cached_features(rows(), tmp_path / "features", what="layers")


def test_foreign_and_damaged_directories_are_refused(tmp_path: Path) -> None:
    model = build()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no features"):
        model.cached_features(rows(), tmp_path / "notes")
    model.cached_features(rows(), tmp_path / "features")
    file = tmp_path / "features" / "last_hidden_state.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is damaged: it has"):
        model.cached_features(rows(), tmp_path / "features")
    (tmp_path / "features" / "features.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="is damaged"):
        model.cached_features(rows(), tmp_path / "features")
    (tmp_path / "features" / "features.json").write_text(
        '{"format": 99, "about": {}, "fields": {}}'
    )
    with pytest.raises(CheckpointError, match="has format 99"):
        model.cached_features(rows(), tmp_path / "features")


def test_a_collator_that_changes_inputs_is_refused(tmp_path: Path) -> None:
    model = build()

    def masking(items: Items) -> dict[str, Tensor]:
        ids = torch.tensor([item["input_ids"][:3] for item in items])
        return {"input_ids": ids.index_fill(1, torch.tensor([1]), 4)}

    with pytest.raises(ConfigError, match="does not keep the input_ids"):
        model.cached_features(rows(), tmp_path / "features", collator=masking)


def test_what_cannot_be_cached_is_refused(tmp_path: Path) -> None:
    model = build()
    for name in ("a", "b"):
        model.add_adapter(name)
        model.adapters[name].requires_grad_(False)

    wrong: list[tuple[dict[str, Any], type[FlexheadsError], str]] = [
        ({"adapter_names": Parallel("a", "b")}, UnsupportedError, "several chains"),
        ({"what": "everything"}, ConfigError, "hidden, layers, pooled"),
        ({"dataset": iter(rows())}, ConfigError, "without a length"),
    ]
    for how, kind, words in wrong:
        given: Any = {"dataset": rows(), "directory": tmp_path / "features", **how}
        with pytest.raises(kind, match=words):
            model.cached_features(**given)
    with pytest.raises(UnsupportedError, match="two sides"):
        build("bart").cached_features(rows(), tmp_path / "features")
    assert not (tmp_path / "features").exists()
