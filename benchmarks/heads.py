"""What many heads over one pass of the backbone cost, over the bare backbone.

Run it alone on a machine, as ``python benchmarks/heads.py``. Everything runs in one process, in
turns, so that what else the machine does falls on all alike. Wall time is what a caller waits, CPU
time what all threads together use. The floor is the same arithmetic in plain torch, with the
weights of the heads in one matrix, and nothing that could tell when they have changed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig

from flexheads import AutoModelWithHeads

HEADS = 50


def build(layers: int) -> Any:
    """A random BERT of six layers, 384 wide, and its heads."""
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536
    )
    model = AutoModelWithHeads.from_config(config).eval()
    for number in range(HEADS):
        model.add_classification_head(f"head {number}", num_labels=2, layers=layers)
    return model


def floor(model: Any, run: Callable[[], Any]) -> Callable[[], Any]:
    """All heads by hand: one product for all first layers, one for each other."""
    heads = [model.heads[f"head {number}"].layers for number in range(HEADS)]
    depth = heads[0].depth
    linears = [[head.get_submodule(str(n)) for head in heads] for n in range(depth)]
    weights = [torch.stack([linear.weight.detach() for linear in each]) for each in linears]
    biases = [torch.stack([linear.bias.detach() for linear in each])[..., None] for each in linears]
    # Two halves, one for each thread. Rows are columns, which is faster where they are few.
    halves, first = weights[0].view(2, -1, weights[0].shape[-1]), biases[0].view(2, -1, 1)

    def call() -> Tensor:
        pooled = run().last_hidden_state[:, 0].t()
        hidden = torch.baddbmm(first, halves, pooled.expand(2, *pooled.shape))
        hidden = hidden.view(HEADS, -1, pooled.shape[1])
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            hidden = torch.baddbmm(bias, weight, functional.tanh(hidden))
        return hidden.transpose(1, 2)

    return call


def variants(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """What is measured."""
    names = [f"head {number}" for number in range(HEADS)]

    def bare() -> Any:
        return model.base_model(**inputs)

    def active(count: int) -> Callable[[], Any]:
        def call() -> Any:
            return model(**inputs)

        call.before = lambda: setattr(model, "active_head", names[:count])  # type: ignore[attr-defined]
        return call

    def one_by_one() -> Any:
        features = bare()
        seen = model._features(model._call_plan(None, names), inputs, features, None, None)
        return [model.heads[name](seen) for name in names]

    return {
        "bare backbone": bare,
        "1 head": active(1),
        "10 heads": active(10),
        f"{HEADS} heads": active(HEADS),
        f"{HEADS} heads one by one": one_by_one,
        f"{HEADS} heads, hand-written floor": floor(model, bare),
    }


def measure(
    calls: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each call, in turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            getattr(call, "before", lambda: None)()
            if turn < 3 or hasattr(call, "before"):
                call()  # what is cached is cached
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            took = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= 3:
                times[name].append(took)
    return times


def table(times: Mapping[str, list[tuple[float, float]]]) -> str:
    """Medians, minima and their ratios to the first line."""
    lines = ["| | wall ms | ratio | fastest ms | ratio | CPU ms | ratio |", "|---|" + "---|" * 6]
    base: list[float] = []
    for name, taken in times.items():
        wall, cpu = zip(*taken, strict=True)
        found = [statistics.median(wall), min(wall), statistics.median(cpu)]
        base = base or found
        cells = [f"{1e3 * own:.2f} | {own / one:.3f}" for own, one in zip(found, base, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2, help="of each head")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = build(asked.layers)
    ids = torch.randint(1000, 30000, (asked.batch, asked.length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        times = measure(variants(model, inputs), asked.rounds)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{asked.threads} threads, {asked.batch} x {asked.length} tokens, {asked.rounds} rounds")
    print(f"{asked.layers} layers in a head\n")
    print(table(times))


if __name__ == "__main__":
    main()
