"""``flexheads predict``: what the heads of a saved model say, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors
from typer.testing import CliRunner

from flexheads.cli import app
from flexheads.testing import randomise, tiny_model

WORDS = ["good", "bad", "film", "very", "who", "[odd]"]
runner = CliRunner(env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A directory with a model and its tokenizer, and the two."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    known = {word: number for number, word in enumerate([*special, *WORDS])}
    inner = tokenizers.Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
    )
    model = randomise(tiny_model("bert"), std=0.3)
    model.add_classification_head("topic", id2label={0: "[up]", 1: "down"})
    model.add_tagging_head("ner", id2label={0: "O", 1: "B-X", 2: "I-X"})
    model.add_qa_head("qa")
    model.add_multiple_choice_head("choice", num_choices=None)
    for head in model.heads.values():
        randomise(head, std=1.0)
    model.active_head = "topic"
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory, model, tokenizer


def lines(*arguments: str, **more: Any) -> list[Any]:
    """What a call prints as JSON."""
    done = runner.invoke(app, ["predict", *arguments, "--json"], **more)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_lines_of_json_are_what_predict_gives(saved: Any) -> None:
    directory, model, tokenizer = saved
    texts = ["good film", "very very bad film"]
    for head, samples, extra in (
        ("topic", texts, []),
        ("ner", texts, []),
        ("qa", [(text, "a very good film") for text in texts], ["--second", "a very good film"]),
        ("choice", [(t, ["good", "bad"]) for t in texts], ["--choice", "good", "--choice", "bad"]),
    ):
        expected = model.predict(head, samples, tokenizer)
        found = lines(str(directory), *texts, "--head", head, *extra)
        assert [own["text"] for own in found] == texts
        assert json.dumps([own["result"] for own in found]) == json.dumps(expected)


def test_the_active_head_reads_the_input(saved: Any) -> None:
    directory, model, tokenizer = saved
    found = lines(str(directory), input="good film\n\nbad\n")
    assert [own["text"] for own in found] == ["good film", "bad"]
    expected = model.predict("topic", ["good film", "bad"], tokenizer)
    assert [own["result"]["label"] for own in found] == [own["label"] for own in expected]


def test_a_table_has_a_line_for_each_thing(saved: Any) -> None:
    directory, model, tokenizer = saved
    done = runner.invoke(app, ["predict", str(directory), "[odd] film", "--head", "ner"])
    assert done.exit_code == 0
    spans = model.predict("ner", "[odd] film", tokenizer)
    assert all(word in done.output for word in ("input", "[odd] film", "entity_group"))
    assert sum(" X " in line for line in done.output.splitlines()) == len(spans)
    done = runner.invoke(app, ["predict", str(directory), "good", "bad"])
    labels = [own["label"] for own in model.predict("topic", ["good", "bad"], tokenizer)]
    assert all(label in done.output for label in labels)


def test_mistakes_are_told_and_fail(saved: Any, tmp_path: Path) -> None:
    directory, *_ = saved
    done = runner.invoke(app, ["predict", str(directory), "good", "--head", "topik"])
    assert done.exit_code == 1
    assert "Did you mean 'topic'" in done.output.replace("\n", " ")
    done = runner.invoke(app, ["predict", str(tmp_path / "nothing"), "good"])
    assert done.exit_code == 1
    model = tiny_model("bert")
    model.add_classification_head("x", set_active=False)
    model.save_pretrained(tmp_path)
    done = runner.invoke(app, ["predict", str(tmp_path), "good"])
    assert done.exit_code == 2
    assert "'x'" in done.output
