"""Names of labels: of each head, and in the model's configuration those of the active one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexheads.errors import ConfigError, LabelError, UnknownNameError, UnsupportedError
from flexheads.heads.base import PredictionHead
from flexheads.heads.config import HeadConfig, label_names
from flexheads.models.container import NamedModules
from flexheads.models.saving.setups import SetupMixin


class HeadLabelsMixin(SetupMixin):
    """The labels of named heads.

    ``config.id2label``, ``config.label2id`` and ``config.num_labels`` are those of the active head,
    or where that has none those of the last one before it. Where no head is active, or several are,
    they are what the model itself had, or what was assigned to them since.
    """

    heads: NamedModules[PredictionHead]
    _shown: Any = None
    """Of which head the configuration shows labels, these labels, and what it said before."""

    def get_labels_dict(self, head_name: str | None = None) -> dict[int, str]:
        """The label names of a head by number.

        Args:
            head_name: The head; None is the active one.

        Raises:
            UnknownNameError: If there is no such head, or not exactly one is active.
            UnsupportedError: If the head has no labels.
        """
        name = self.active_head if head_name is None else head_name
        if not isinstance(name, str):
            raise UnknownNameError("active head", name, self.heads, "Name one.")
        labels = self.heads[name].id2label
        if labels is None:
            raise UnsupportedError(f"Head {name!r} has no labels.")
        return labels

    def get_labels(self, head_name: str | None = None) -> list[str]:
        """The label names of a head in order; see `get_labels_dict`."""
        return list(self.get_labels_dict(head_name).values())

    def _show_labels(self) -> None:
        """Lets the model's configuration name the labels of the active head."""
        config, routes = self._attachment.backbone.config, self._attachment.runtime.active.heads
        head = self.heads[routes[0].head] if len(routes) == 1 else None
        own: Any = config.id2label, config.label2id
        shown, labels, before = self._shown or (None, None, None)
        if self._shown is not None and config.id2label == labels:
            own = before
        if head is not None and head.id2label is not None:
            names = head.id2label
            config.id2label, config.label2id = names, {name: n for n, name in names.items()}
            self._shown = head.name, names, own
        elif self._shown is not None and (head is None or shown not in self.heads):
            config.id2label, config.label2id = own
            self._shown = None


def with_names(kind: type[HeadConfig], config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration whose labels may be given by ``id2label`` or counted by name.

    Args:
        kind: The configuration's class.
        config: Its fields, perhaps with ``id2label``; the number of labels may be left out where
            they are named.

    Raises:
        LabelError: If two of these contradict each other.
        ConfigError: If the class has no names of labels.
    """
    fields, known = dict(config), kind._names()
    count = "num_labels" if "num_labels" in known else "num_choices"
    by_number, by_name = fields.pop("id2label", None), fields.get("label2id")
    counted = fields.get(count) is not None
    if by_number is None and (counted or not isinstance(by_name, Mapping)):
        return fields
    if "label2id" not in known:
        raise ConfigError(f"{kind.__name__} has no labels, so id2label and label2id name nothing.")
    if by_number is None:
        by_number = {number: name for name, number in (by_name or {}).items()}
    named = label_names(fields.get(count), by_number, count)
    if by_name is not None and by_name != named["label2id"]:
        raise LabelError(
            f"id2label={by_number!r} and label2id={by_name!r} contradict each other; leave one out."
        )
    return {**fields, "label2id": named["label2id"], count: named["num_labels"]}
