"""Which methods, heads and blocks an architecture carries, as tried on a tiny model of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch

from flexheads.composition import Average, BatchSplit, Block, Fuse, Parallel, Rows, Split, Stack
from flexheads.errors import CompositionError, FlexheadsError, UnsupportedError
from flexheads.plugins import registry
from flexheads.testing import tiny_inputs, tiny_model
from flexheads.testing.tiny_heads import tiny_head

INVERTIBLE = "seq_bn_inv"


def columns() -> dict[str, str]:
    """What is tried: one configuration of each method but unions, and one with a coupling."""
    methods = [spec for spec in registry().methods.values() if spec.name != "union"]
    firsts = {spec.name: next(iter(spec.identifiers)) for spec in methods}
    found = {}
    for name, config in firsts.items():
        found[name] = config
        if not found.keys() & {"invertible"}:
            found["invertible"] = INVERTIBLE
    return found


def carried(architecture: str, fields: Mapping[str, str]) -> list[bool]:
    """For each configuration, whether a model of an architecture takes an adapter of it.

    Args:
        architecture: The architecture.
        fields: What stands in for configurations of which a field must be given.
    """
    answers = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about what tiny configurations lack
        model = tiny_model(architecture)
        for config in columns().values():
            try:
                model.add_adapter("tried", fields.get(config, config))
            except FlexheadsError:
                answers.append(False)
            else:
                answers.append(True)
                model.delete_adapter("tried")
    return answers


def heads(architecture: str) -> list[bool]:
    """For each type of head, whether a model of an architecture takes one."""
    model = tiny_model(architecture)

    def add(head_type: str) -> None:
        model.add_head("tried", head_type, **tiny_head(head_type, model.spec))
        model.delete_head("tried")

    return [_works(add, head_type) for head_type in registry().head_types]


@torch.no_grad()
def blocks(architecture: str) -> list[bool]:
    """For each kind of block, whether a model of an architecture runs under one."""
    model = tiny_model(architecture)
    for name in ("a", "b"):
        model.add_adapter(name)
    model.add_adapter_fusion("a,b")
    inputs = tiny_inputs(model.config)
    found = model(**inputs)
    length = found.last_hidden_state.shape[1] if "last_hidden_state" in found else 7

    def run(block: Block) -> None:
        model(**inputs, adapter_names=block)

    return [_works(run, block) for block in examples(length).values()]


def examples(length: int = 7) -> dict[str, Block]:
    """A block of each kind, for three rows of a length."""
    return {
        "Stack": Stack("a", "b"),
        "Fuse": Fuse("a", "b"),
        "Split": Split("a", "b", splits=[2, length - 2]),
        "Average": Average("a", "b"),
        "Parallel": Parallel("a", "b"),
        "BatchSplit": BatchSplit("a", "b", batch_sizes=[2, 1]),
        "Rows": Rows(["a", None, "b"]),
    }


def _works(call: Callable[..., None], argument: object) -> bool:
    try:
        call(argument)
    except (UnsupportedError, CompositionError):
        return False
    return True
