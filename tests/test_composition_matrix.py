"""Every configuration in every block, in models of three kinds: as defined, or refused."""

from __future__ import annotations

import pytest

from flexheads.errors import UnsupportedError
from flexheads.plugins import registry
from flexheads.testing.block_matrix import BLOCKS, Bench, configurations

ARCHITECTURES = ("bert", "gpt2", "t5")
"""An encoder, a decoder, and both with cross attention between them."""

PREFIXED = {"prefix_tuning", "prefix_tuning_flat", "mam", "unipelt"}
PREFIX = "prefix_tuning[prefix_length=3,bottleneck_size=8]"
MIXED = (
    ("seq_bn", "lora"),
    ("lora", PREFIX),
    ("par_bn", "loreft"),
    ("ia3", "seq_bn_inv"),
    ("dora", "lora"),
    ("double_seq_bn", "mam"),
    ("oft", "lora"),
    ("prompt_tuning[prompt_length=3]", "lora"),
)
ROWS = {column for column in BLOCKS if column in ("BatchSplit", "Parallel", "Rows", "MultiTask")}


def named(config: str) -> str:
    return config.partition("[")[0]


def refused(architecture: str, *configs: str) -> set[str]:
    """The columns in which adapters of these configurations have no meaning."""
    names = set(map(named, configs))
    found = set() if any(map(fuses, configs[:1])) else {"Fuse"}
    if names & {*PREFIXED, "prompt_tuning"}:
        # Every position sees a prefix; and a mean needs prefixes of one length.
        found |= {"Split", "BatchSplit in Split", "Average in Rows"}
        found |= {"Average"} if len(names) > 1 else set()
    if names & PREFIXED and architecture == "t5":
        # Relative positions count through these, for all rows alike.
        found |= {"Rows with None", "Stack in Parallel"}
        found |= {*ROWS, "BatchSplits in Stack"} if len(names) > 1 else set()
    return found


def fuses(config: str) -> bool:
    """Whether AdapterFusion is about adapters of a configuration."""
    name = named(config)
    return ("bn" in name or "compacter" in name or name == "adapter_plus") and "inv" not in name


def cells(*bench: str) -> dict[str, str]:
    made = Bench(*bench)
    return {block: made.cell(block) for block in BLOCKS}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("config", configurations())
def test_cells(config: str, architecture: str) -> None:
    if (named(config), architecture) == ("trainable_tokens", "t5"):
        with pytest.raises(UnsupportedError, match="two sides"):
            Bench(architecture, config)
        return
    found = cells(architecture, config)
    assert {b for b, cell in found.items() if cell != "correct"} == refused(architecture, config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("configs", MIXED, ids=" and ".join)
def test_methods_are_mixed_in_one_block(configs: tuple[str, str], architecture: str) -> None:
    found = cells(architecture, *configs)
    assert {b for b, cell in found.items() if cell != "correct"} == refused(architecture, *configs)


def test_every_registered_configuration_is_in_the_matrix() -> None:
    tried = {config.partition("[")[0] for config in configurations()}
    meanings = {
        repr(identifier)
        for spec in registry().methods.values()
        for name, identifier in spec.identifiers.items()
        if name in tried
    }
    for spec in registry().methods.values():
        assert {repr(identifier) for identifier in spec.identifiers.values()} <= meanings
