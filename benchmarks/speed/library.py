"""The rows that are measured alike for every library: training, managing, importing."""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from benchmarks.speed import training
from benchmarks.speed.importing import import_ratios
from benchmarks.speed.pairing import Call, Found, Trial, compare, spent, summed_up, taken
from benchmarks.speed.probe import Probe, inference

IMPORTS = ("import", "import_registry", "import_class")
MANY, FILES = 100, 50
"""How many adapters are added and switched between; how many are saved and loaded."""


class Library(Protocol):
    """What the rows need of a library."""

    name: str

    @property
    def imports(self) -> Mapping[str, str]:
        """What a new interpreter runs for each of the rows about importing."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables for a new interpreter that imports it."""

    def fresh(self, probe: Probe) -> Any:
        """A model that can be given adapters."""

    def add(self, model: Any, name: str, config: str, leave_out: int = 0) -> None:
        """Adds an adapter to all layers but the first `leave_out`."""

    def train(self, model: Any, name: str) -> None:
        """Makes this adapter active, and alone trainable."""

    def activate(self, model: Any, name: str) -> None:
        """Makes this adapter active."""

    def save(self, model: Any, name: str, folder: Path) -> None:
        """Writes an adapter."""

    def load(self, model: Any, name: str, folder: Path) -> None:
        """Reads an adapter."""

    def from_pretrained(self, folder: Path) -> Any:
        """Loads a whole model, so that it can be given adapters."""


# --- training ---------------------------------------------------------------------------------


def trained(library: Library, probe: Probe, config: str, half: bool = False) -> Any:
    """A model in training, with one adapter that is trained."""
    model = library.fresh(probe)
    library.add(model, "a0", config, probe.layers // 2 if half else 0)
    library.train(model, "a0")
    return model.train()


def training_trial(probe: Probe, model: Any) -> Trial:
    """A step of this model over one of full fine-tuning."""
    inputs = probe.inputs(probe.train)
    return Trial(*(training.step(each, inputs) for each in (training.fine_tuned(probe), model)))


def _training(library: Library, probe: Probe, repeats: int, **how: Any) -> Found:
    model = trained(library, probe, **how)
    found = compare({library.name: training_trial(probe, model)}, repeats, probe.clocks)
    return found[library.name]


def _kept(library: Library, probe: Probe, repeats: int, dropout: bool = True, **how: Any) -> Found:
    probe = probe if dropout else probe.without_dropout()
    return Found(training.kept(trained(library, probe, **how), probe.inputs(probe.keep)))


# --- managing ---------------------------------------------------------------------------------


def _with_many(library: Library, probe: Probe, count: int, config: str) -> Any:
    model = library.fresh(probe)
    _add_all(library, model, count, config)
    return model


def _add_all(library: Library, model: Any, count: int, config: str) -> None:
    for number in range(count):
        library.add(model, f"a{number}", config)


def _add(library: Library, probe: Probe, repeats: int) -> Found:
    def prepared() -> Call:
        model = library.fresh(probe)
        return lambda: _add_all(library, model, MANY, "lora")

    return spent(prepared, repeats, probe.clocks)


def _save(library: Library, probe: Probe, repeats: int) -> Found:
    model = _with_many(library, probe, FILES, "lora")
    with tempfile.TemporaryDirectory() as folder:

        def prepared() -> Call:
            shutil.rmtree(folder)
            Path(folder).mkdir()
            return lambda: _save_all(library, model, Path(folder))

        return spent(prepared, repeats, probe.clocks)


def _save_all(library: Library, model: Any, folder: Path) -> None:
    for number in range(FILES):
        library.save(model, f"a{number}", folder / str(number))


def _load_all(library: Library, model: Any, folder: Path) -> None:
    for number in range(FILES):
        library.load(model, f"a{number}", folder / str(number))


def _load(library: Library, probe: Probe, repeats: int) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        _save_all(library, _with_many(library, probe, FILES, "lora"), Path(folder))

        def prepared() -> Call:
            model = library.fresh(probe)
            return lambda: _load_all(library, model, Path(folder))

        return spent(prepared, repeats, probe.clocks)


def _switch_alone(library: Library, probe: Probe, repeats: int, *, config: str) -> Found:
    """Milliseconds of activating, each adapter for the first time, one after the other."""
    model = _with_many(library, probe, MANY, config)
    library.activate(model, "a0")
    gc.collect()
    clock, spent = probe.clocks[:1], []
    for number in range(1, MANY):
        spent += taken(partial(library.activate, model, f"a{number}"), clock)
    return summed_up([1e3 * each for each in spent])


def _switch(library: Library, probe: Probe, repeats: int, *, config: str) -> Found:
    """Milliseconds of activating and the call that follows, each adapter for the first time.

    The call is of one token, and is taken off again; so what is put off to it counts.
    """
    model = _with_many(library, probe, MANY, config)
    inputs = probe.inputs((1, 1))
    library.activate(model, "a0")
    gc.collect()
    clock, more = probe.clocks[:1], []
    with inference():
        for number in range(1, MANY):
            begun = clock[0]()
            library.activate(model, f"a{number}")
            model(**inputs)
            both = clock[0]() - begun
            again = [taken(lambda: model(**inputs), clock)[0] for _ in range(3)]
            more.append(1e3 * (both - statistics.median(again)))
    return summed_up(more)


def _from_pretrained(library: Library, probe: Probe, repeats: int) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        probe.bare.save_pretrained(folder)
        plain = type(probe.bare)
        trial = Trial(
            lambda: plain.from_pretrained(folder), lambda: library.from_pretrained(Path(folder))
        )
        return compare({library.name: trial}, repeats, probe.clocks, collect=True)[library.name]


_imported: dict[str, Found] = {}
"""Rows about importing that nobody has asked for yet; all of a library are measured together."""


def _import(library: Library, probe: Probe, repeats: int, *, row: str) -> Found:
    if row not in _imported:
        _imported.update(import_ratios(library.imports, repeats, library.environment))
    return _imported.pop(row)


Measure = Callable[..., Found]
ROWS: Mapping[str, tuple[Measure, dict[str, Any]]] = {
    "training": (_training, {"config": "seq_bn"}),
    "training_half": (_training, {"config": "seq_bn", "half": True}),
    "training_lora": (_training, {"config": "lora"}),
    "kept": (_kept, {"config": "seq_bn"}),
    "kept_half": (_kept, {"config": "seq_bn", "half": True}),
    "kept_lora": (_kept, {"config": "lora"}),
    "kept_p0": (_kept, {"config": "seq_bn", "dropout": False}),
    "kept_lora_p0": (_kept, {"config": "lora", "dropout": False}),
    "add": (_add, {}),
    "load": (_load, {}),
    "save": (_save, {}),
    "switch_alone": (_switch_alone, {"config": "lora"}),
    "switch": (_switch, {"config": "lora"}),
    "switch_seq_bn_alone": (_switch_alone, {"config": "seq_bn"}),
    "switch_seq_bn": (_switch, {"config": "seq_bn"}),
    "from_pretrained": (_from_pretrained, {}),
    **{row: (_import, {"row": row}) for row in IMPORTS},
}
FEW = ("add", "load", "save", *IMPORTS)
"""Rows that take seconds, and so are repeated at most this often."""
MOST = 5


def measured(library: Library, probe: Probe, key: str, repeats: int) -> Found:
    """What a row says of a library."""
    measure, how = ROWS[key]
    return measure(library, probe, min(repeats, MOST) if key in FEW else repeats, **how)
