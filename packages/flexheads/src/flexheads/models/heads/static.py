"""The head of a transformers class: whatever it has outside of its backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from flexheads.checkpoints.bundle import SavedStaticHead
from flexheads.errors import CheckpointError
from flexheads.heads.classification import ProblemType
from flexheads.heads.config import label_names
from flexheads.models.container import NamedModules


class StaticHead:
    """A view on the static head of a model.

    Args:
        model: A model with adapter support.

    Attributes:
        keys: The head's entries in the model's state dict.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        backbone = model._attachment.backbone
        children = list(model.named_children())
        inside = {n for n, c in children if c is backbone or isinstance(c, NamedModules)}
        if backbone is model:
            inside |= set(model._attachment.own_children())
        self.children = [child for child in children if child[0] not in inside]
        self.state: dict[str, Tensor] = {}
        if self.children:
            model._save_to_state_dict(self.state, "", False)
        for name, child in self.children:
            child.state_dict(destination=self.state, prefix=f"{name}.")
        self.keys = tuple(self.state)

    def modules(self) -> list[nn.Module]:
        """The modules outside of the backbone."""
        return [child for _, child in self.children]

    def saved(self) -> SavedStaticHead | None:
        """The head as it is saved, or None for a class without one."""
        if not self.keys:
            return None
        config = self.model.config
        return SavedStaticHead(
            model_class=type(self.model).__name__,
            tensors=self.state,
            label2id=_label2id(config),
            problem_type=getattr(config, "problem_type", None),
        )

    def check(self, head: SavedStaticHead) -> None:
        """Refuses a head that does not fit.

        Raises:
            CheckpointError: If a tensor is missing, left over or of another shape, or would change
                the backbone, because the model ties it to its embeddings.
        """
        problems = [f"{key} is missing" for key in self.keys if key not in head.tensors]
        problems += [f"{key} is left over" for key in head.tensors if key not in self.state]
        shared = {p.data_ptr() for p in self.model._backbone_parameters()}
        for key, tensor in self.state.items():
            new = head.tensors.get(key)
            if new is None:
                continue
            if new.shape != tensor.shape:
                problems.append(
                    f"{key} has shape {tuple(new.shape)} instead of {tuple(tensor.shape)}"
                )
            elif tensor.data_ptr() in shared and not torch.equal(new.to(tensor), tensor):
                problems.append(f"{key} is tied to the backbone here, and differs from it")
        problems += self._wrong_settings(head)
        if problems:
            raise CheckpointError(
                f"The head of {head.model_class} does not fit this model: {'; '.join(problems)}. "
                "Load with with_head=False, or into a model with as many labels."
            )

    def _wrong_settings(self, head: SavedStaticHead) -> list[str]:
        """What is wrong with the labels and the kind of loss in a file."""
        problems, count = [], self.model.config.num_labels
        labels = head.label2id
        if labels is not None and sorted(labels.values()) != list(range(len(labels))):
            problems.append(f"its labels are numbered {sorted(labels.values())}")
        sized = any(t.dim() and t.shape[0] == count for t in self.state.values())
        if labels is not None and len(labels) != count and sized:
            problems.append(f"it names {len(labels)} labels, and this model has {count}")
        if head.problem_type not in (None, *get_args(ProblemType)):
            problems.append(f"problem_type={head.problem_type!r} is unknown")
        return problems

    @torch.no_grad()
    def fill(self, head: SavedStaticHead, id2label: Mapping[int, str] | None = None) -> None:
        """Takes over a head that fits, with its labels.

        Raises:
            CheckpointError: If it does not fit; nothing is changed then.
        """
        self.check(head)
        config = self.model.config
        labels = head.label2id
        if id2label is not None:
            labels = label_names(config.num_labels, id2label)["label2id"]
        for key, tensor in self.state.items():
            tensor.copy_(head.tensors[key])
        # Where the head has no labels, such as a language model's, the file may name any number.
        if labels is not None and len(labels) == config.num_labels:
            config.id2label = {number: name for name, number in labels.items()}
            config.label2id = dict(labels)
        if head.problem_type is not None:
            config.problem_type = head.problem_type


def _label2id(config: Any) -> dict[str, int] | None:
    """The label names of a model, each to its number.

    Users set ``id2label``, ``label2id`` or both, and transformers leaves the other one as it was.
    """
    names = {int(number): name for number, name in (config.id2label or {}).items()}
    numbers = {name: number for number, name in names.items()}
    unnamed = all(name == f"LABEL_{number}" for number, name in names.items())
    given = dict(config.label2id or {})
    if (unnamed or len(numbers) < len(names)) and sorted(given.values()) == sorted(names):
        return given or None
    return numbers or None
