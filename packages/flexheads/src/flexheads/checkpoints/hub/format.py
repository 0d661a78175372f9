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
from flexheads.checkpoints.hub.envelope import (
    envelope,
    find_weights,
    read_provenance,
    require_weights,
    required_field,
)
from flexheads.checkpoints.hub.fusion import (
    FUSION_CONFIG,
    FUSION_WEIGHTS,
    read_fusion,
    write_fusion,
)
from flexheads.checkpoints.hub.heads import HeadNames, modern_head_config
from flexheads.checkpoints.hub.methods import adapter_names
from flexheads.checkpoints.store import read_json, read_tensors, write_json, write_tensors
from flexheads.errors import CheckpointError
from flexheads.methods.config import load_config

ADAPTER_CONFIG, HEAD_CONFIG = "adapter_config.json", "head_config.json"
ADAPTER_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")


class AdapterHubFormat(Format):
    """A configuration and the weights, of an adapter or a fusion and of a head."""

    def detect(self, directory: Path) -> bool:
        return any(
            (directory / config).is_file() and find_weights(directory, weights) is not None
            for config, weights in (
                (ADAPTER_CONFIG, ADAPTER_WEIGHTS),
                (FUSION_CONFIG, FUSION_WEIGHTS),
                (HEAD_CONFIG, HEAD_WEIGHTS),
            )
        )

    def read(self, directory: Path, layout: Layout, *, with_head: bool = True) -> Bundle:
        adapter, adapter_from = None, Provenance()
        if (directory / ADAPTER_CONFIG).is_file():
            content = read_json(directory / ADAPTER_CONFIG)
            adapter_from = read_provenance(content)
            layout.check(adapter_from, "adapter", directory)
            adapter = self._read_adapter(directory, content, layout)
        fusion, fusion_from = None, Provenance()
        if (directory / FUSION_CONFIG).is_file():
            content = read_json(directory / FUSION_CONFIG)
            fusion_from = read_provenance(content)
            layout.check(fusion_from, "fusion", directory)
            fusion = read_fusion(directory, content, layout)
        head, head_from = None, Provenance()
        if with_head and (directory / HEAD_CONFIG).is_file():
            content = read_json(directory / HEAD_CONFIG)
            head_from = read_provenance(content)
            layout.check(head_from, "head", directory)
            head = self._read_head(directory, content, layout)
        elif with_head and (weights := find_weights(directory, HEAD_WEIGHTS)) is not None:
            raise CheckpointError(
                f"{weights} is there, but no {HEAD_CONFIG} that says what it is. Load with "
                "with_head=False to leave it out."
            )
        return Bundle(
            adapter=adapter,
            fusion=fusion,
            head=head,
            adapter_from=adapter_from,
            fusion_from=fusion_from,
            head_from=head_from,
            source=directory,
        )

    def _read_adapter(
        self, directory: Path, content: Mapping[str, Any], layout: Layout
    ) -> SavedAdapter:
        path = require_weights(directory, ADAPTER_WEIGHTS)
        name, config = (
            required_field(content, "name", directory),
            required_field(content, "config", directory),
        )
        config = content.get("flexheads", {}).get("config") or modern_config(content, layout)
        names = adapter_names(name, config, layout, old=content.get("version") is None)
        tensors, unexpected = names.read(read_tensors(path))
        if unexpected:
            raise CheckpointError(
                f"{path}: {len(unexpected)} tensors have no place in adapter {name!r} of a "
                f"{layout.architecture} model: {', '.join(sorted(unexpected)[:5])}. The file is "
                "damaged, or was made for another architecture."
            )
        return SavedAdapter(name=name, config=names.config, tensors=tensors)

    def _read_head(
        self, directory: Path, content: Mapping[str, Any], layout: Layout
    ) -> SavedHead | SavedStaticHead:
        path = require_weights(directory, HEAD_WEIGHTS)
        raw, config = read_tensors(path), content.get("config")
        if config is None:
            # Of some classes the library saves the whole backbone, or shared prefixes, as the head.
            raw = {k: t for k, t in raw.items() if layout.below(k) == k and _is_of_head(k)}
            labels = content.get("label2id")
            return SavedStaticHead(
                model_class=required_field(content, "model_class", directory),
                tensors=raw,
                label2id=labels and {name: int(number) for name, number in labels.items()},
                problem_type=content.get("problem_type"),
            )
        name = required_field(content, "name", directory)
        config = content.get("flexheads", {}).get("config") or modern_head_config(content)
        if config.get("use_pooler") and not layout.pooler:
            config["use_pooler"] = False  # where there is none, the library does not look at it
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
            config = hub_config(adapter.config, layout)
            content = envelope(bundle.adapter_from, adapter.name, config)
            read = load_config(modern_config(content, layout), tolerant=True)
            if read != load_config(adapter.config):  # that library has no words for all of it
                content["flexheads"]["config"] = dict(adapter.config)
            tensors = adapter_names(adapter.name, adapter.config, layout).write(adapter.tensors)
            write_json(directory / ADAPTER_CONFIG, content)
            write_tensors(directory / ADAPTER_WEIGHTS[0], tensors)
        if bundle.fusion is not None:
            write_fusion(bundle, bundle.fusion, directory, layout)
        if isinstance(head, SavedHead):
            names = HeadNames(head.config)
            content = envelope(bundle.head_from, head.name, names.hub_config())
            content["flexheads"]["config"] = dict(head.config)
            tensors = {names.key(key, head.name): tensor for key, tensor in head.tensors.items()}
            if head.embeddings is not None:
                tensors[names.key("weight", head.name)] = head.embeddings
            write_json(directory / HEAD_CONFIG, content)
            write_tensors(directory / HEAD_WEIGHTS[0], tensors)
        elif head is not None:
            content = envelope(bundle.head_from, None, None)
            content |= {"model_class": head.model_class, "problem_type": head.problem_type}
            if head.label2id is not None:
                content |= {"label2id": dict(head.label2id), "num_labels": len(head.label2id)}
            write_json(directory / HEAD_CONFIG, content)
            write_tensors(directory / HEAD_WEIGHTS[0], head.tensors)


def _is_of_head(key: str) -> bool:
    return not key.startswith(("prefix_tuning.", "shared_parameters."))
