"""Whole models: one directory that holds backbone, adapters, heads, and what was active."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from flexheads.checkpoints.store import read_tensors
from flexheads.checkpoints.transfer import fill
from flexheads.composition import from_json, to_json
from flexheads.errors import CheckpointError, UnsupportedError
from flexheads.heads.custom import provider_of
from flexheads.methods.base import to_be_filled
from flexheads.methods.config import load_config
from flexheads.methods.fusion import AdapterFusionConfig
from flexheads.models.adapters.checkpointing import CheckpointingMixin
from flexheads.models.adapters.prefixes import PrefixMixin
from flexheads.models.adapters.sharing import SharingMixin
from flexheads.models.saving.files import library_version, reading
from flexheads.models.saving.whole_peer import describe_from_peer, is_from_peer, restore_from_peer
from flexheads.plan import HeadRoute

logger = logging.getLogger(__name__)

_KEY = "flexheads"
_OWN = ("adapters.", "adapter_fusions.", "heads.", "loss_weights.")
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
)


class WholeModelMixin(CheckpointingMixin, SharingMixin, PrefixMixin):
    """``save_pretrained`` for models with adapters.

    All tensors go where transformers puts them, under ``adapters.`` and ``heads.`` beside the
    backbone's own, so that the stock trainer resumes from such a directory; the configuration
    says how to build what they fill.
    """

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Saves the whole model; see transformers for the arguments.

        Raises:
            UnsupportedError: If an adapter is merged, because it would act twice after loading, or
                if transformers' own methods have added adapters of PEFT, which it saves alone.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            raise UnsupportedError(
                "This model has adapters of PEFT, and a whole model with both kinds cannot be "
                "saved. Delete those, or save each kind by itself: save_adapter for ours, "
                "get_adapter_state_dict(name) for those of PEFT."
            )
        if self._merged:
            raise UnsupportedError(
                f"{next(iter(self._merged))!r} is merged into the backbone; "
                "call reset_adapter() before saving the whole model."
            )
        if _would_rename(self):
            # Names of old checkpoints would be put into the keys of adapters too.
            kwargs.setdefault("save_original_format", False)
        config = self._attachment.backbone.config
        config.flexheads = describe(self)
        if (state := self._unshared_state(kwargs.get("state_dict"))) is not None:
            kwargs["state_dict"] = state
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            del config.flexheads


def describe(model: Any) -> dict[str, Any]:
    """What a saved configuration says about adapters and heads, in the order they were added."""
    active = model._attachment.runtime.active
    heads, weights = getattr(model, "heads", {}), getattr(model, "loss_weights", {})
    return {
        "version": library_version(),
        "adapters": [[name, adapter.config.to_dict()] for name, adapter in model.adapters.items()],
        "adapter_fusions": [
            [name, list(fusion.members), fusion.config.to_dict()]
            for name, fusion in model.adapter_fusions.items()
        ],
        "heads": [
            [name, provider_of(head.head_type), head.to_dict()] for name, head in heads.items()
        ],
        "loss_weights": [[name, weight.described()] for name, weight in weights.items()],
        "shared": {group: list(names) for group, names in model._sharing().items()},
        "active_adapters": to_json(active.setup),
        "skip_layers": list(active.skip_layers),
        "active_heads": [[route.head, route.chain] for route in active.heads],
    }


def _would_rename(model: Any) -> bool:
    """Whether transformers, on saving, would write the keys of adapters and heads differently."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # a release that renames nothing
        return False
    own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(_OWN)}
    return set(revert_weight_conversion(model, own)) != set(own)


def load_backbone(
    backbone_class: type[PreTrainedModel], path: str, *args: Any, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Loads a model by its own class, and says what was missing or left over.

    Tensors of adapters and heads are no surprise, so transformers' report of them is kept quiet.
    """
    with _quiet_about_adapters() as report:
        loaded: Any = backbone_class.from_pretrained(
            path, *args, output_loading_info=True, **kwargs
        )
    model, info = loaded
    if from_peer := describe_from_peer(model.config):
        setattr(model.config, _KEY, from_peer)
    others = [k for k in info["unexpected_keys"] if not k.startswith(_OWN)]
    if report.dropped and (info["missing_keys"] or others):
        logger.warning(
            "%s: missing %s; left over %s.", path, sorted(info["missing_keys"]), sorted(others)
        )
    return model, info


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments of ``from_pretrained`` that say where files come from."""
    return {name: value for name, value in kwargs.items() if name in _HUB_ARGUMENTS}


def restore(model: Any, path: str, kwargs: Mapping[str, Any]) -> None:
    """Builds and fills the adapters and heads that a saved configuration describes.

    Args:
        model: The model, with its backbone loaded.
        path: Where that was loaded from.
        kwargs: The arguments of ``from_pretrained``.

    Raises:
        CheckpointError: If tensors are missing, left over or of another shape, or the description
            is damaged.
    """
    config = model._attachment.backbone.config
    described = config.__dict__.pop(_KEY, None)
    hub = hub_arguments(kwargs)
    if described is None:
        return
    if is_from_peer(described):
        with reading(path):
            restore_from_peer(model, path, described, _tensors(path, hub))
        return
    tensors = _tensors(path, hub, _OWN)
    with reading(path):
        _restore_adapters(model, path, described, tensors)
        # A class with a static head leaves flexible heads, and so what was active of them, behind.
        active: Any = ()
        if hasattr(model, "heads"):
            _restore_heads(model, path, described, tensors)
            active = described["active_heads"]
        heads = tuple(HeadRoute(*route) for route in active)
        skip_layers = tuple(described.get("skip_layers", ()))
        model._activate(from_json(described["active_adapters"]), heads, skip_layers)


def _restore_adapters(
    model: Any, path: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Builds and fills the adapters and fusions; see `restore`."""
    for name, fields in described["adapters"]:
        with to_be_filled():
            adapter = model._build_adapter(name, load_config(fields, tolerant=True))
        own = _take(tensors, f"adapters.{model.adapters.key(name)}.")
        fill(adapter, own, f"{path}: adapter {name!r}")
        model._install(adapter)
    for group, names in described.get("shared", {}).items():
        model.share_parameters(names, group)
    for name, members, fields in described.get("adapter_fusions", ()):
        fusion = model._build_fusion(name, tuple(members), AdapterFusionConfig.load(fields))
        own = _take(tensors, f"adapter_fusions.{model.adapter_fusions.key(name)}.")
        fill(fusion, own, f"{path}: fusion {name!r}")
        model._install_fusion(fusion)


def _restore_heads(
    model: Any, path: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Builds and fills the heads, and what their losses count; see `restore`."""
    for name, provider, fields in described["heads"]:
        fields = dict(fields)
        with to_be_filled():
            head = model._build_head(name, fields.pop("head_type"), fields, provider, True)
        fill(head, _take(tensors, f"heads.{model.heads.key(name)}."), f"{path}: head {name!r}")
        model._install_head(head)
    for name, value in described.get("loss_weights", ()):
        model.set_loss_weights({name: value})
        own = _take(tensors, f"loss_weights.{model.loss_weights.key(name)}.")
        fill(model.loss_weights[name], own, f"{path}: loss weight of head {name!r}")


def _take(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: tensor for k, tensor in tensors.items() if k.startswith(prefix)}


def _tensors(
    path: str, hub: Mapping[str, Any], begins: tuple[str, ...] = ("",)
) -> dict[str, Tensor]:
    """The tensors in the files of a saved model, sharded or not, whose names begin so."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        single = _file(path, name, hub)
        if single is not None:
            return read_tensors(single, begins)
        index = _file(path, f"{name}.index.json", hub)
        if index is not None:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [_file(path, shard, hub) for shard in sorted(shards)]
            return {
                name: tensor
                for file in files
                if file is not None
                for name, tensor in read_tensors(file, begins).items()
            }
    raise CheckpointError(f"{path} has adapters in its configuration, but no weights.")


def _file(path: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    if Path(path).is_dir():
        local = Path(path) / hub.get("subfolder", "") / name
        return local if local.is_file() else None
    found = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return None if found is None else Path(found)


class _Report(logging.Filter):
    """Drops what transformers reports of adapters and heads, which it cannot know."""

    dropped = False

    def filter(self, record: logging.LogRecord) -> bool:
        ours = any(word in record.getMessage() for word in _OWN)
        self.dropped |= ours
        return not ours


@contextmanager
def _quiet_about_adapters() -> Iterator[_Report]:
    """Keeps transformers from reporting adapters and heads as tensors that nobody expects."""
    names = ("modeling_utils", "utils.loading_report")
    loggers = [logging.getLogger(f"transformers.{name}") for name in names]
    report = _Report()
    for each in loggers:
        each.addFilter(report)
    try:
        yield report
    finally:
        for each in loggers:
            each.removeFilter(report)
