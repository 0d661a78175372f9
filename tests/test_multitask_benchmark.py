"""benchmarks/multitask.py: what it reads, how it measures, and a whole run on a tiny model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(
    "FLEXHEADS_DATA" not in os.environ or importlib.util.find_spec("accelerate") is None,
    reason="needs accelerate, and the data sets that FLEXHEADS_DATA names",
)


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random encoder, and a tokenizer that knows single characters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    signs = string.ascii_lowercase + string.digits + string.punctuation
    words = [*special, *signs, *(f"##{sign}" for sign in signs)]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("further", [{}, {"mixed": True, "shared": True, "weights": "learned"}])
def test_a_whole_run_measures_both_ways(
    further: dict[str, Any], script: Any, encoder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "numbers.json"
    script("multitask").main(steps=1, batch=2, limit=4, model=str(encoder), output=file, **further)
    numbers = json.loads(file.read_text("utf-8"))
    tasks = {"sst2", "wnut17", "squad_xquad_en", "commonsense_qa"}
    for way in ("alone", "together"):
        assert set(numbers[way]) == {*tasks, "seconds"}
        assert all(0 <= numbers[way][task] <= 1 for task in tasks)


def test_the_right_answers_score_one(script: Any, encoder: Path) -> None:
    from transformers import AutoTokenizer

    data, tokenizer = script("multitask_data"), AutoTokenizer.from_pretrained(encoder)
    folder = Path(os.environ["FLEXHEADS_DATA"])
    for name in data.TASKS:
        task = data.load(name, folder, tokenizer, 20, seed=1)
        rows = task.dev
        if name == "squad_xquad_en":
            there = [row["start_positions"] > 0 for row in rows]
            longest = max(len(row["input_ids"]) for row in rows)
            truth = [np.array([row[key] for row in rows]) for key in _ENDS]
            # An answer that was cut off is not to be found; any other scores its words.
            score = task.metric([np.eye(longest)[ends] for ends in truth], truth)
            assert any(there)
            assert score["f1"] >= np.mean(there) * 0.95
            continue
        truth, classes = [row["labels"] for row in rows], 20
        if name == "wnut17":
            longest = max(map(len, truth))
            truth = [own + [-100] * (longest - len(own)) for own in truth]
        labels = np.array(truth)
        assert task.metric(np.eye(classes)[labels.clip(0)], labels)[task.shown] == 1.0


_ENDS = ("start_positions", "end_positions")
