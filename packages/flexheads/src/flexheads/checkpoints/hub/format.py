"""The AdapterHub layout, which the `adapters` library and its ancestors have used since 2020."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexheads.checkpoints.bundle import (
    Bundle,
    Format,
    Layout,
    Provenance,
    SavedAdapter,
    SavedHead,
    SavedStaticHead,
)
from flexheads.checkpoints.hub.configs import hub_config, modern_config
from flexheads.checkpoints.hub.heads import HeadNames, modern_head_config
from flexheads.checkpoints.hub.methods import adapter_names
from flexheads.checkpoints.store import read_json, read_tensors, write_json, write_tensors
from flexheads.errors import CheckpointError

ADAPTER_CONFIG, HEAD_CONFIG = "adapter_config.json", "head_config.json"
ADAPTER_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")


class AdapterHubFormat(Format):
    """Up to four files: a configuration and the weights, of an adapter and of a head."""

    def detect(self, directory: Path) -> bool:
        return any(
            (directory / config).is_file() and _weights(directory, weights) is not None
            for config, weights in (
                (ADAPTER_CONFIG, ADAPTER_WEIGHTS),
                (HEAD_CONFIG, HEAD_WEIGHTS),
            )
        )

    def read(self, directory: Path, layout: Layout, *, with_head: bool = True) -> Bundle:
        adapter, adapter_from = None, Provenance()
        if (directory / ADAPTER_CONFIG).is_file():
            content = read_json(directory / ADAPTER_CONFIG)
            adapter_from = _provenance(content)
            layout.check(adapter_from, "adapter", directory)
            adapter = self._read_adapter(directory, content, layout)
        head, head_from = None, Provenance()
        if with_head and (directory / HEAD_CONFIG).is_file():
            content = read_json(directory / HEAD_CONFIG)
            head_from = _provenance(content)
            layout.check(head_from, "head", directory)
            head = self._read_head(directory, content)
        elif with_head and (weights := _weights(directory, HEAD_WEIGHTS)) is not None:
            raise CheckpointError(
                f"{weights} is there, but no {HEAD_CONFIG} that says what it is. Load with "
                "with_head=False to leave it out."
            )
        return Bundle(
            adapter=adapter,
            head=head,
            adapter_from=adapter_from,
            head_from=head_from,
            source=directory,
        )

    def _read_adapter(
        self, directory: Path, content: Mapping[str, Any], layout: Layout
    ) -> SavedAdapter:
        path = _require(directory, ADAPTER_WEIGHTS)
        name, config = _field(content, "name", directory), _field(content, "config", directory)
        config = content.get("flexheads", {}).get("config") or modern_config(content)
        names = adapter_names(name, config, layout, old=content.get("version") is None)
        tensors, unexpected = names.read(read_tensors(path))
        if unexpected:
            raise CheckpointError(
                f"{path}: {len(unexpected)} tensors have no place in adapter {name!r} of a "
                f"{layout.architecture} model: {', '.join(sorted(unexpected)[:5])}. The file is "
                "damaged, or was made for another architecture."
            )
        return SavedAdapter(name=name, config=config, tensors=tensors)

    def _read_head(
        self, directory: Path, content: Mapping[str, Any]
    ) -> SavedHead | SavedStaticHead:
        path = _require(directory, HEAD_WEIGHTS)
        raw, config = read_tensors(path), content.get("config")
        if config is None:
            labels = content.get("label2id")
            return SavedStaticHead(
                model_class=_field(content, "model_class", directory),
                tensors=raw,
                label2id=labels and {name: int(number) for name, number in labels.items()},
                problem_type=content.get("problem_type"),
            )
        name = _field(content, "name", directory)
        config = content.get("flexheads", {}).get("config") or modern_head_config(content)
        names = HeadNames(config)
        tensors, unexpected = {}, []
        for key, tensor in raw.items():
            address = names.address(key, name)
            if address is None:
                unexpected.append(key)
            elif address:
                tensors[address] = tensor
        if unexpected:
            raise CheckpointError(
                f"{path}: {len(unexpected)} tensors have no place in head {name!r}: "
                f"{', '.join(sorted(unexpected)[:5])}."
            )
        return SavedHead(name=name, config=config, tensors=tensors)

    def write(self, bundle: Bundle, directory: Path, layout: Layout) -> None:
        adapter, head = bundle.adapter, bundle.head
        if adapter is not None:
            config = hub_config(adapter.config)
            content = _envelope(bundle.adapter_from, adapter.name, config)
            if config != dict(adapter.config):
                content["flexheads"]["config"] = dict(adapter.config)
            tensors = adapter_names(adapter.name, adapter.config, layout).write(adapter.tensors)
            write_json(directory / ADAPTER_CONFIG, content)
            write_tensors(directory / ADAPTER_WEIGHTS[0], tensors)
        if isinstance(head, SavedHead):
            names = HeadNames(head.config)
            content = _envelope(bundle.head_from, head.name, names.hub_config())
            content["flexheads"]["config"] = dict(head.config)
            tensors = {names.key(key, head.name): tensor for key, tensor in head.tensors.items()}
            if head.embeddings is not None:
                tensors[names.key("weight", head.name)] = head.embeddings
            write_json(directory / HEAD_CONFIG, content)
            write_tensors(directory / HEAD_WEIGHTS[0], tensors)
        elif head is not None:
            content = _envelope(bundle.head_from, None, None)
            content |= {"model_class": head.model_class, "problem_type": head.problem_type}
            if head.label2id is not None:
                content |= {"label2id": dict(head.label2id), "num_labels": len(head.label2id)}
            write_json(directory / HEAD_CONFIG, content)
            write_tensors(directory / HEAD_WEIGHTS[0], head.tensors)


def _envelope(
    origin: Provenance, name: str | None, config: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "config": config,
        "hidden_size": origin.hidden_size,
        "model_class": origin.model_class,
        "model_name": origin.model_name,
        "model_type": origin.model_type,
        "name": name,
        "version": origin.version,
        "flexheads": {"provider": origin.provider},
    }


def _provenance(content: Mapping[str, Any]) -> Provenance:
    keys = ("model_type", "model_class", "model_name", "hidden_size", "version")
    own = content.get("flexheads", {})
    return Provenance(**{key: content.get(key) for key in keys}, provider=own.get("provider"))


def _field(content: Mapping[str, Any], key: str, directory: Path) -> Any:
    if content.get(key) is None:
        raise CheckpointError(f"{directory}: the configuration has no {key!r}; it is damaged.")
    return content[key]


def _weights(directory: Path, names: tuple[str, ...]) -> Path | None:
    return next((directory / name for name in names if (directory / name).is_file()), None)


def _require(directory: Path, names: tuple[str, ...]) -> Path:
    path = _weights(directory, names)
    if path is None:
        raise CheckpointError(
            f"{directory} has a configuration but no weights: there should be a file "
            f"{' or '.join(names)}."
        )
    return path
