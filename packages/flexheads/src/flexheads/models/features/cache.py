"""The features of a frozen backbone, computed once: heads then train without it."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.utils import logging

from flexheads.composition import Setup, to_json
from flexheads.errors import CheckpointError, ConfigError, UnsupportedError
from flexheads.models.calls.inputs import flatten_choices
from flexheads.models.features.collating import FeatureCollator, own_positions, pad_items
from flexheads.models.features.given import (
    FEATURES,
    POOLED_AS,
    acting,
    refuse_trainable,
    what_is_read,
)
from flexheads.models.features.lower_layers import (
    AFTER,
    check_alike,
    check_frozen,
    check_layers,
    lower_tensors,
    run_lower,
)
from flexheads.models.features.store import FeatureStore, field_of
from flexheads.plan import HeadRoute, Plan
from flexheads.sites.prompt import POOLED

WHAT = ("hidden", "layers", "pooled")
_NOT_COMPUTING = (
    "adapters",
    "prediction_heads",
    "flexheads",
    "id2label",
    "label2id",
    "transformers_version",
    "_name_or_path",
    "architectures",
)
"""What of a model's configuration makes no difference to its features."""

Item = dict[str, Any]


class FeatureCache(Dataset[Item]):
    """A data set whose items have the features of a backbone beside their inputs and labels.

    Items are those of the data set it was made for, without what the model's forward does not
    take, and with ``features``. `collator` makes batches of them, which the model takes as any
    others, but does not run its backbone for.

    Attributes:
        collator: Makes a batch of items.
    """

    def __init__(
        self, dataset: Any, store: FeatureStore, collator: FeatureCollator, keep: frozenset[str]
    ) -> None:
        self._dataset, self._store, self._keep = dataset, store, keep
        self.collator = collator

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Item:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Item {index} of {len(self)}.")
        index %= len(self)
        return {**kept(self._dataset[index], self._keep), FEATURES: self._store.row(index)}


class FeatureCacheMixin:
    """``cached_features`` for models with flexible heads."""

    def cached_features(
        self,
        dataset: Any,
        directory: str | Path | None = None,
        *,
        batch_size: int = 32,
        collator: Callable[[list[Any]], Any] | None = None,
        adapter_names: Setup = None,
        what: str = "hidden",
        lower_layers: int | None = None,
        progress: bool | None = None,
    ) -> FeatureCache:
        """Computes the backbone's features of a data set once, into files; heads train on them.

        Interrupted, it goes on where it was when it is called again. What is there already is
        compared by hashes: of the backbone's and adapters' weights, and of each row's inputs.

        Args:
            dataset: Anything with a length and items that are mappings.
            directory: Where the files are, or shall be. None is a directory below
                ``flexheads/features`` in the cache of Hugging Face's libraries (``HF_HOME``), named
                by a hash of the weights and of all inputs.
            batch_size: Rows that the backbone sees at once.
            collator: Makes a batch of items, labels included, as a trainer would use it. None pads
                on the right, inputs with the model's padding token and labels with -100.
            adapter_names: The adapters that act; None is the active setup, an empty list none.
            what: ``"hidden"``, the last hidden states; ``"layers"``, those of every layer, for
                heads with ``hidden_layer``; ``"pooled"``, only the vectors that the model's heads
                read, which takes a small part of the room.
            lower_layers: How many of the lowest layers to do without, instead of all: what the
                others are given is stored, and they and the adapters in them can be trained.
            progress: Whether to show a progress bar; None does on a terminal.

        Returns:
            The data set to train on, together with its `FeatureCache.collator`.

        Raises:
            UnsupportedError: If the backbone or an active adapter is trainable, rows follow several
                chains of adapters, or the model has two sides. With `lower_layers`: if an active
                adapter acts in them, they are trainable, or the model's layers hand on more than
                hidden states.
            CheckpointError: If the directory holds something else, or features of other weights,
                adapters or inputs.
            ConfigError: If the data set has no length, or the collator changes inputs.
        """
        return _Computing(self, collator, adapter_names, what, lower_layers).run(
            dataset, directory, batch_size, progress
        )


class _Computing:
    """One call of `FeatureCacheMixin.cached_features`."""

    def __init__(
        self, model: Any, collator: Any, adapter_names: Setup, what: str, lower: int | None
    ) -> None:
        if what not in (WHAT if lower is None else WHAT[:1]):
            kinds = ", ".join(WHAT)
            raise ConfigError(
                f"what={what!r} should be one of {kinds}; with lower_layers, it is left out."
            )
        self.model, self.what, self.lower = model, what, lower
        self.plan: Plan = model._call_plan(adapter_names, [])
        if lower is None:
            refuse_trainable(model, self.plan)
        else:
            check_layers(model, lower)
            check_frozen(model, self.plan, lower)
        if lower is None and not self.plan.routing.single:
            raise UnsupportedError(
                f"{self.plan.setup!r} sends rows through several chains of adapters. Make a cache "
                "for each chain."
            )
        if model.spec.pooling is None or getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedError(
                "Features of a model with two sides are not cached: what a decoder reads can "
                "depend on the labels."
            )
        self.pooled = what_is_read(model) if what == "pooled" else ()
        self.collate = collator or pad_items(getattr(model.config, "pad_token_id", None))
        labels = [label for head in model.heads.values() for label in head.label_names]
        parameters = inspect.signature(model.forward).parameters
        self.keep = frozenset([*parameters, *labels, "label", "label_ids"])

    def run(
        self, dataset: Any, directory: str | Path | None, batch_size: int, progress: bool | None
    ) -> FeatureCache:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ConfigError("A data set without a length or without items cannot be cached.")
        about = self.about()
        directory = self.place(about, dataset) if directory is None else directory
        store = FeatureStore(directory, about)
        if len(store) > len(dataset):
            raise CheckpointError(
                f"{directory} has {len(store)} rows, but the data set has {len(dataset)}."
            )
        for row in range(len(store)):
            if self.digest(dataset[row]) != store.digest(row):
                raise CheckpointError(
                    f"{directory} was made from other inputs: those of row {row} differ. Delete "
                    "it, or give another directory."
                )
        bar = logging.tqdm(
            total=len(dataset),
            initial=len(store),
            desc="features",
            unit=" rows",
            disable=None if progress is None else not progress,
        )
        with _evaluating(self.model), bar:
            if self.lower is not None and len(dataset):
                self.try_upper(dataset[0], self.lower)
            while len(store) < len(dataset):
                numbers = range(len(store), min(len(store) + batch_size, len(dataset)))
                self.add(store, [dataset[number] for number in numbers])
                bar.update(len(numbers))
        store.close()
        setup = json.dumps(to_json(self.plan.setup)) if self.lower is None else None
        return FeatureCache(dataset, store, FeatureCollator(self.collate, setup), self.keep)

    def try_upper(self, item: Mapping[str, Any], lower: int) -> None:
        """Finds out on one item whether the upper layers can do without the lower ones."""
        inputs, _ = flatten_choices(self.inputs(self.collate([kept(item, self.keep)])))
        plan = dataclasses.replace(self.plan, heads=())
        with self.model._enter(plan):
            check_alike(self.model, plan, inputs, lower)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the backbone reads of a batch, on the model's device."""
        named = {name: batch[name] for name in batch if name in self.model.input_names}
        device = self.model.device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in named.items()}

    def place(self, about: Mapping[str, Any], dataset: Any) -> Path:
        """Where features go that were given no directory: a place for just these."""
        found = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16)
        for number in range(len(dataset)):
            found.update(self.digest(dataset[number]))
        return Path(constants.HF_HOME) / "flexheads" / "features" / found.hexdigest()

    def about(self) -> dict[str, Any]:
        """What the features depend on beside the inputs."""
        plan = self.plan
        if self.lower is not None:
            return {
                "weights": _hash_of(self.model, plan, self.lower),
                "kind": ["lower", self.lower],
            }
        return {
            "weights": _hash_of(self.model, plan),
            "adapters": [to_json(plan.setup), list(plan.skip_layers)],
            "kind": [self.what, *sorted(self.pooled)],
        }

    def digest(self, item: Mapping[str, Any]) -> bytes:
        """A hash of what the backbone reads of an item."""
        names = sorted(name for name in item if name in self.model.input_names)
        found = hashlib.blake2b(digest_size=16)
        for name in names:
            found.update(f"{name} {_described(item[name])}".encode())
        return found.digest()

    @torch.no_grad()
    def add(self, store: FeatureStore, items: Sequence[Mapping[str, Any]]) -> None:
        """Computes the features of some rows, and stores them."""
        batch = self.collate([kept(item, self.keep) for item in items])
        found, long = self.compute(self.inputs(batch))
        rows, done = [], 0
        for item in items:
            count, positions = own_positions(item, batch, done)
            own = {name: tensor[done : done + count] for name, tensor in found.items()}
            rows.append({n: t[:, positions] if n in long else t for n, t in own.items()})
            done += count
        if any(done != tensor.shape[0] for tensor in found.values()):
            raise ConfigError("The collator makes more or fewer rows of the items than there are.")
        if not store.fields:
            store.declare({name: field_of(t, name in long) for name, t in rows[0].items()})
        store.append([self.digest(item) for item in items], rows)

    def compute(self, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], frozenset[str]]:
        """The features of a batch, and the names of those that have something for each position."""
        model, backbone = self.model, self.model._attachment.backbone
        inputs, choices = flatten_choices(batch)
        if self.lower is not None:
            name = f"{AFTER}{self.lower}"
            with model._enter(Plan()):
                return {name: run_lower(model, inputs, self.lower)}, frozenset({name})
        layers = {"output_hidden_states": True} if self.what == "layers" else {}
        # Prompts tell what is at the first position where there is a head to read it.
        with model._enter(dataclasses.replace(self.plan, heads=(HeadRoute(""),))):
            output = backbone(**{**inputs, **layers}, return_dict=True)
        first = model._attachment.runtime.peek(POOLED)
        features = model._features(self.plan, inputs, output, choices, None)
        if self.what == "pooled":
            return {POOLED_AS + kind: features.pooled(kind) for kind in self.pooled}, frozenset()
        found = {"last_hidden_state": features.hidden}
        if self.what == "layers":
            found["hidden_states"] = torch.stack(output.hidden_states, dim=2)
        long = frozenset(found)
        if features.pooler_output is not None:
            found["pooler_output"] = features.pooler_output
        if first is not None:
            found["first"] = first
        return found, long


def kept(item: Mapping[str, Any], keep: frozenset[str]) -> Item:
    """An item without what the model's forward does not take."""
    return {name: value for name, value in item.items() if name in keep}


def _hash_of(model: Any, plan: Plan, lower: int | None = None) -> str:
    """A hash of the weights and the configuration that features depend on."""
    found = hashlib.blake2b(digest_size=16)
    backbone = model._attachment.backbone
    config = backbone.config.to_dict()
    own = {name: value for name, value in config.items() if name not in _NOT_COMPUTING}
    found.update(json.dumps(own, sort_keys=True, default=repr).encode())
    parts: list[tuple[str, Any, Any]] = []
    if lower is not None:
        parts = [("backbone", {}, lower_tensors(model, lower))]
    else:
        parts = [("backbone", {}, backbone.state_dict().items())]
        for where, name in acting(plan):
            module = getattr(model, where)[name]
            described = module.config.to_dict()
            parts.append((f"{where} {name}", described, module.state_dict().items()))
    for part, described, tensors in parts:
        found.update(f"{part} {json.dumps(described, sort_keys=True, default=repr)}".encode())
        for name, tensor in tensors:
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(_bytes(tensor))
    return found.hexdigest()


def _described(value: Any) -> str:
    """A hash of an input, with its shape; numbers are the same as lists and in tensors."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):  # lists of different lengths
        return json.dumps(value, default=repr)
    digest = hashlib.blake2b(_bytes(tensor), digest_size=16).hexdigest()
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest}"


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and every module of it back into its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
