"""AdapterFusion on any model: adding, training, saving, and seeing what it attends to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexheads.checkpoints.bundle import Bundle, SavedFusion
from flexheads.checkpoints.transfer import fill, write_bundle
from flexheads.composition import Fuse, parse_composition
from flexheads.errors import CheckpointError, CompositionError, ConfigError, UnknownNameError
from flexheads.methods.fusion import (
    AdapterFusion,
    AdapterFusionConfig,
    FusionPart,
    fusion_dropout,
)
from flexheads.models.adapters.embeddings import EmbeddingsMixin
from flexheads.models.saving.files import SavingMixin, reading
from flexheads.sites.base import place

Fusable = Fuse | Sequence[str] | str
"""What users write for a fusion: its block, the names of its adapters, or those in one string."""


class FusionMixin(SavingMixin, EmbeddingsMixin):
    """``add_adapter_fusion`` and what belongs to it."""

    def add_adapter_fusion(
        self,
        adapter_names: Fusable,
        config: str | Mapping[str, Any] | None = None,
        name: str | None = None,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        """Adds attention over adapters that are in the model.

        Args:
            adapter_names: The adapters, as a Fuse block, a list, or ``"a,b"``.
            config: ``"dynamic"`` (also None), ``"static"``, or a configuration.
            name: The fusion's name; None is the adapters' names, joined by commas.
            overwrite_ok: Replace a fusion of that name.
            set_active: Activate it.

        Raises:
            UnknownNameError: If an adapter does not exist.
            ConfigError: If the name is taken, or the adapters do not act at the same places.
        """
        block = _as_fuse(adapter_names, name)
        self._refuse_taken("adapter_fusion", block.name, overwrite_ok)
        fusion = self._build_fusion(block.name, block.members(), AdapterFusionConfig.load(config))
        self._install_fusion(fusion)
        if set_active:
            self.set_active_adapters(block)

    def delete_adapter_fusion(self, adapter_names: Fusable) -> None:
        """Removes a fusion; where it was active, no adapter is.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        name = _name_of(adapter_names)
        self.adapter_fusions.drop(name)
        self._sync(self.adapters.values())
        self._changed()

    def train_adapter_fusion(self, setup: Any, unfreeze_adapters: bool = False) -> None:
        """Makes the fusions of a setup trainable, with the active head, and activates it.

        Args:
            setup: A Fuse block, a block that holds some, or a list of the adapters to fuse.
            unfreeze_adapters: Train the adapters too.

        Raises:
            UnknownNameError: If an adapter or a fusion does not exist; nothing is changed then.
            CompositionError: If the setup fuses nothing.
        """
        listed = isinstance(setup, (list, tuple)) and all(isinstance(s, str) for s in setup)
        block = Fuse(*setup) if listed else parse_composition(setup)
        fuses = [b for b in (block.blocks() if block else ()) if isinstance(b, Fuse)]
        if not fuses:
            raise CompositionError(f"{setup!r} fuses nothing; give a Fuse block.")
        self.train_adapter(block)
        if not unfreeze_adapters:
            self.adapters.requires_grad_(False)
        for fuse in fuses:
            self.adapter_fusions[fuse.name].requires_grad_(True)

    def get_fusion_regularization_loss(self) -> Tensor | None:
        """What to add to the loss while training a fusion with a value projection.

        ``0.01 * sum((I - V)^2)`` over the sites of every trainable fusion that is configured for
        it, so that V stays near the identity (Pfeiffer et al. 2021, arXiv:2005.00247); None
        where there is none.
        """
        trained = [
            fusion
            for fusion in self.adapter_fusions.values()
            if any(parameter.requires_grad for parameter in fusion.parameters())
        ]
        terms = [term for f in trained if (term := f.regularization()) is not None]
        return torch.stack(terms).sum() if terms else None

    def adapter_fusion_to(
        self,
        adapter_names: Fusable,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Moves a fusion to a device or dtype.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        self.adapter_fusions[_name_of(adapter_names)].to(device=device, dtype=dtype)

    # --- files ----------------------------------------------------------------------------------

    def save_adapter_fusion(
        self,
        save_directory: str | Path,
        adapter_names: Fusable,
        with_head: bool | str = False,
        format: str = "adapterhub",
    ) -> None:
        """Saves a fusion, without the adapters that it fuses.

        Args:
            save_directory: The directory; it is made where it does not exist.
            adapter_names: The fusion.
            with_head: Save a head beside it: one of this name, or (True) of the fusion's name or
                else the active one.
            format: The layout of files.

        Raises:
            UnknownNameError: If there is no such fusion, head or format.
            CheckpointError: If the directory cannot be used.
        """
        fusion = self.adapter_fusions[_name_of(adapter_names)]
        head = self._saved_head(self._head_of_fusion(fusion.name, with_head)) if with_head else None
        bundle = Bundle(
            fusion=SavedFusion(
                name=fusion.name,
                members=fusion.members,
                config=fusion.config.to_dict(),
                tensors=fusion.state_dict(),
            ),
            head=head,
            fusion_from=self._provenance(None),
            head_from=self._head_provenance(head),
        )
        write_bundle(bundle, save_directory, self._layout(), format)

    def _head_of_fusion(self, name: str, with_head: bool | str) -> str:
        if isinstance(with_head, str):
            return with_head
        heads = getattr(self, "heads", ())
        active = getattr(self, "active_head", None)
        return active if name not in heads and isinstance(active, str) else name

    def load_adapter_fusion(
        self,
        adapter_fusion_name_or_path: str | Path,
        load_as: str | None = None,
        with_head: bool = True,
        set_active: bool = False,
        overwrite_ok: bool = False,
        revision: str | None = None,
    ) -> str:
        """Loads a fusion; the adapters that it fuses must be in the model.

        Args:
            adapter_fusion_name_or_path: A directory, or the id of a repository on the hub.
            load_as: Name for the fusion; None keeps the saved name.
            with_head: Load a head that lies beside it.
            set_active: Activate the fusion.
            overwrite_ok: Replace a fusion or a head of that name.
            revision: Branch, tag or commit on the hub.

        Returns:
            The fusion's name.

        Raises:
            CheckpointError: If the files cannot be read, or do not fit this model.
            ConfigError: If a name is taken.
            UnknownNameError: If an adapter does not exist.
        """
        bundle = self._read(adapter_fusion_name_or_path, revision, with_head)
        saved = bundle.fusion
        if saved is None:
            raise CheckpointError(f"{bundle.source} holds no fusion; use load_adapter().")
        name = saved.name if load_as is None else load_as
        self._refuse_taken("adapter_fusion", name, overwrite_ok)
        self._check_members(saved.members)
        with reading(bundle.source):
            config = AdapterFusionConfig.load(saved.config)
            fusion = self._build_fusion(name, saved.members, config)
            for part in fusion.parts.values():
                part.temperature = 1.0  # type: ignore[assignment]  # annealed when it was trained
            fill(fusion, saved.tensors, f"{bundle.source}: fusion {name!r}")
        heads = self._prepare_head(bundle, None, None, overwrite_ok) if with_head else None
        self._install_fusion(fusion)
        self._install_prepared(heads)
        if set_active:
            self.set_active_adapters(Fuse(*saved.members, name=name))
        return name

    # --- helpers --------------------------------------------------------------------------------

    def _check_members(self, members: Sequence[str]) -> None:
        if unknown := [name for name in members if name not in self.adapters]:
            raise UnknownNameError("adapter", unknown[0], self.adapters, "Add or load it first.")

    def _build_fusion(
        self, name: str, members: tuple[str, ...], config: AdapterFusionConfig
    ) -> AdapterFusion:
        """A new fusion that is not in the model yet, at every residual site of its adapters."""
        self._check_members(members)
        sites = self._attachment.sites
        places = [
            [a for a in self.adapters[member] if sites[a].kind == "residual"] for member in members
        ]
        if not places[0] or any(set(own) != set(places[0]) for own in places):
            raise ConfigError(
                f"{list(members)} cannot be fused: AdapterFusion needs bottleneck adapters that "
                "act at the same places. Give them configurations with the same mh_adapter, "
                "output_adapter, cross_adapter and leave_out."
            )
        dropout = fusion_dropout(config, self._attachment.backbone.config)
        parts: dict[str, FusionPart] = {}
        for address in places[0]:
            parts[address] = FusionPart(sites[address].width, config, dropout)
            place(parts[address], sites[address].host)
        return AdapterFusion(name, members, config, parts).train(self.training)

    def _install_fusion(self, fusion: AdapterFusion) -> None:
        self._sync(self.adapters.values(), fusion)
        self.adapter_fusions.put(fusion.name, fusion)
        self._changed()


def _as_fuse(fusable: Fusable, name: str | None) -> Fuse:
    if isinstance(fusable, Fuse):
        return fusable if name is None else Fuse(*fusable, name=name)
    names = fusable.split(",") if isinstance(fusable, str) else fusable
    return Fuse(*names, name=name)


def _name_of(fusable: Fusable) -> str:
    return fusable if isinstance(fusable, str) else _as_fuse(fusable, None).name
