"""flexheads, and what its works cost by hand."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.speed import by_hand, by_hand_files, compiled, library, training, works
from benchmarks.speed.pairing import Found, compare
from benchmarks.speed.probe import Probe, stir

from flexheads import AutoModelWithHeads, Fuse, SeqBnConfig

DISTRIBUTIONS = ("flexheads",)
PLUGINS = 10
_READ = f"assert len(flexheads.registry().architectures) >= {PLUGINS}"


class Flexheads:
    """The library."""

    name = "flexheads"
    imports: Mapping[str, str] = {
        "import": "import flexheads",
        "import_registry": f"import flexheads; {_READ}",
        "import_class": f"import flexheads; flexheads.AutoModelWithHeads; {_READ}",
    }

    @property
    def environment(self) -> Mapping[str, str]:
        """Switches off all plugins but ten."""
        plugins = importlib.metadata.entry_points(group="flexheads")
        rest = sorted(plugin.name for plugin in plugins)[PLUGINS:]
        return {"FLEXHEADS_DISABLE_PLUGINS": ",".join(rest)}

    def fresh(self, probe: Probe) -> Any:
        return works.flexible(probe)

    def add(self, model: Any, name: str, config: Any, leave_out: int = 0) -> None:
        model.add_adapter(name, SeqBnConfig(leave_out=[*range(leave_out)]) if leave_out else config)

    def train(self, model: Any, name: str) -> None:
        model.train_adapter(name)

    def activate(self, model: Any, name: str) -> None:
        model.set_active_adapters(name)

    def save(self, model: Any, name: str, folder: Path) -> None:
        model.save_adapter(folder, name)

    def load(self, model: Any, name: str, folder: Path) -> None:
        model.load_adapter(folder, load_as=name)

    def from_pretrained(self, folder: Path) -> Any:
        return AutoModelWithHeads.from_pretrained(folder)


OURS = Flexheads()


# --- training, with a floor -------------------------------------------------------------------


def by_hand_training(probe: Probe, model: Any, config: str) -> Any:
    """The same training by hand: what a row trains, in a backbone of its own."""
    backbone = probe.backbone().requires_grad_(False)
    before = set(backbone.parameters())
    {"lora": by_hand.lora, "seq_bn": by_hand.stack}[config](backbone, model, "a0")
    for parameter in set(backbone.parameters()) - before:
        parameter.requires_grad_(True)
    return backbone.train()


def same_gradients(probe: Probe, model: Any, backbone: Any) -> None:
    """Requires that a step gives the same gradients, dropout left aside.

    Raises:
        AssertionError: If it does not.
    """
    sides = []
    for each in (model, backbone):
        trained = [one for one in each.parameters() if one.requires_grad]
        sides.append(training.gradients(each.eval(), probe.inputs(probe.train), trained))
        each.train()
    for ours, floor in zip(*sides, strict=True):
        probe.require_same(ours, floor)


def _training(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    how = library.ROWS[key][1]
    model = library.trained(OURS, probe, **how)
    stir(model.adapters)
    backbone = by_hand_training(probe, model, how["config"])
    same_gradients(probe, model, backbone)
    trials = {
        "flexheads": library.training_trial(probe, model),
        "floor": library.training_trial(probe, backbone),
    }
    return compare(trials, repeats, probe.clocks)


def _training_fuse(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    """A fusion is trained, and the adapters that it fuses are not."""
    model = works.fuse(probe).model
    model.train_adapter_fusion(Fuse("a0", "a1", "a2"))
    trials = {"flexheads": library.training_trial(probe, model.train())}
    return compare(trials, repeats, probe.clocks)


def _kept(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    """The floor is without dropout: its masks need not be kept, they can be drawn again."""
    how, still = dict(library.ROWS[key][1]), probe.without_dropout()
    model = library.trained(OURS, probe if how.pop("dropout", True) else still, **how)
    backbone = by_hand_training(still, model, how["config"])
    inputs = probe.inputs(probe.keep)
    return {
        "flexheads": Found(training.kept(model, inputs)),
        "floor": Found(training.kept(backbone, inputs)),
    }


def _kept_full(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    probe = probe.without_dropout() if key.endswith("p0") else probe
    return {"bare": Found(training.kept(training.fine_tuned(probe), probe.inputs(probe.keep)))}


# --- all rows ---------------------------------------------------------------------------------


def _alike(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    found = {"flexheads": library.measured(OURS, probe, key, repeats)}
    if key in by_hand_files.ROWS:
        found["floor"] = by_hand_files.measured(probe, key, repeats)
    return found


MEASURES: dict[str, Callable[[Probe, str, int], dict[str, Found]]] = {
    **dict.fromkeys(works.TRIALS, works.measured),
    **dict.fromkeys(library.ROWS, _alike),
    **dict.fromkeys([key for key in library.ROWS if key.startswith("training")], _training),
    "training_fuse": _training_fuse,
    **dict.fromkeys([key for key in library.ROWS if key.startswith("kept")], _kept),
    **dict.fromkeys(["kept_full", "kept_full_p0"], _kept_full),
    **dict.fromkeys(compiled.ROWS, compiled.measured),
}
