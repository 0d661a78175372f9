"""Managing LoRAs by hand: banks of factors that are filled, written and read with safetensors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.speed.by_hand_parts import layers_of, projection
from benchmarks.speed.pairing import Call, Found, spent
from benchmarks.speed.probe import Probe
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RANK, MANY, FILES = 8, 100, 50
Banks = dict[str, Tensor]


def _banks(probe: Probe, count: int) -> Banks:
    """The factors of all adapters at each place, new."""
    banks: Banks = {}
    for number, layer in enumerate(layers_of(probe.bare)):
        for role in ("query", "value"):
            linear = projection(layer, role)
            down = linear.weight.new_empty(count, RANK, linear.in_features)
            banks[f"{number}.{role}.A"] = nn.init.kaiming_uniform_(down, a=5**0.5)
            banks[f"{number}.{role}.B"] = linear.weight.new_zeros(count, linear.out_features, RANK)
    return banks


def _add(probe: Probe, repeats: int) -> Found:
    return spent(lambda: lambda: _banks(probe, MANY), repeats, probe.clocks)


def _save_all(banks: Banks, folder: Path) -> None:
    for number in range(FILES):
        own = folder / str(number)
        own.mkdir(exist_ok=True)
        save_file({key: bank[number] for key, bank in banks.items()}, own / "adapter.safetensors")
        (own / "adapter.json").write_text(json.dumps({"r": RANK, "name": str(number)}))


def _load_all(banks: Banks, folder: Path) -> None:
    for number in range(FILES):
        json.loads((folder / str(number) / "adapter.json").read_text())
        for key, value in load_file(folder / str(number) / "adapter.safetensors").items():
            banks[key][number] = value


@torch.no_grad()
def _files(probe: Probe, repeats: int, work: Callable[[Banks, Path], None]) -> Found:
    banks = _banks(probe, FILES)
    with tempfile.TemporaryDirectory() as folder:
        _save_all(banks, Path(folder))

        def prepared() -> Call:
            return lambda: work(banks, Path(folder))

        return spent(prepared, repeats, probe.clocks)


ROWS: dict[str, Callable[[Probe, int], Found]] = {
    "add": _add,
    "load": lambda probe, repeats: _files(probe, repeats, _load_all),
    "save": lambda probe, repeats: _files(probe, repeats, _save_all),
}


def measured(probe: Probe, key: str, repeats: int) -> Found:
    """What a row takes by hand."""
    return ROWS[key](probe, repeats)
