"""Whole setups in one directory: a composition, its adapters, its fusions and its heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flexheads.checkpoints.hub.setup import hub_setup, setup_from_hub
from flexheads.checkpoints.store import read_json, staged, write_json
from flexheads.checkpoints.transfer import find_source
from flexheads.composition import Block, Fuse, Setup, parse_composition
from flexheads.errors import CheckpointError, CompositionError
from flexheads.models.saving.files import library_version, reading
from flexheads.models.saving.fusions import FusionMixin

_FILE = "adapter_setup.json"
_SAFE = " !#$&'()+,;=@[]^`{}~"


class SetupMixin(FusionMixin):
    """``save_adapter_setup`` and ``load_adapter_setup``."""

    def save_adapter_setup(
        self,
        save_directory: str | Path,
        adapter_setup: Setup,
        head_setup: bool | str | Sequence[str] | None = None,
    ) -> None:
        """Saves a composition with everything in it, each in a sub-directory of its name.

        Args:
            save_directory: The directory; it is made where it does not exist.
            adapter_setup: The composition.
            head_setup: Heads to save with it: a name, several, or True for a static head.

        Raises:
            CompositionError: If the setup is empty.
            UnknownNameError: If an adapter, a fusion or a head does not exist.
        """
        block = parse_composition(adapter_setup)
        if block is None:
            raise CompositionError("There is no setup to save; name some adapters.")
        single = isinstance(head_setup, (str, bool))
        heads: list[Any] = [head_setup] if single else list(head_setup or ())  # type: ignore[arg-type]
        with staged(Path(save_directory).expanduser()) as aside:
            for name in block.names():
                self.save_adapter(aside / _folder(name), name, with_head=False)
            for fuse in _fuses(block):
                self.save_adapter_fusion(aside / _folder(fuse.name), fuse)
            for head in filter(None, heads):
                self._save_one_head(aside, head)
            content = {
                "adapter_setup": hub_setup(block),
                "head_setup": heads[0] if single else heads or None,
                "version": f"flexheads.{library_version()}",
            }
            write_json(aside / _FILE, content)

    def _save_one_head(self, aside: Path, head: str | bool) -> None:
        saved = self._saved_head("" if head is True else str(head))
        if saved is not None:
            self._write_head(saved, aside / _folder("head" if head is True else str(head)), _FORMAT)

    def load_adapter_setup(
        self, adapter_setup_name_or_path: str | Path, set_active: bool = False
    ) -> tuple[Block | None, Any]:
        """Loads what `save_adapter_setup` wrote.

        Args:
            adapter_setup_name_or_path: The directory, or the id of a repository on the hub.
            set_active: Activate the setup and its heads.

        Returns:
            The composition, and the heads as they were named when it was saved.

        Raises:
            CheckpointError: If the files cannot be read, or do not fit this model; what was loaded
                before is taken out again.
            ConfigError: If a name is taken.
        """
        source = find_source(adapter_setup_name_or_path)
        if not (source / _FILE).is_file():
            raise CheckpointError(f"{source} holds no {_FILE}; is it the folder of one adapter?")
        content = read_json(source / _FILE)
        with reading(source):
            block = setup_from_hub(content.get("adapter_setup"))
            heads = content.get("head_setup")
        loaded: list[tuple[Any, str]] = []
        try:
            for name in () if block is None else block.names():
                folder = source / _folder(name)
                loaded.append((self.delete_adapter, self.load_adapter(folder, with_head=False)))
            for fuse in () if block is None else _fuses(block):
                folder = source / _folder(fuse.name)
                name = self.load_adapter_fusion(folder, with_head=False)
                loaded.append((self.delete_adapter_fusion, name))
            self._load_heads(source, heads)
        except Exception:
            for delete, name in reversed(loaded):
                delete(name)
            raise
        if set_active:
            self.set_active_adapters(block)
            if hasattr(self, "heads") and isinstance(heads, (str, list)):
                setattr(self, "active_head", heads)  # noqa: B010  # only classes with heads have it
        return block, heads

    def _load_heads(self, source: Path, heads: Any) -> None:
        names = [heads] if isinstance(heads, str) else heads if isinstance(heads, list) else []
        load: Any = getattr(self, "load_head", None)
        for name in names if hasattr(self, "heads") else ():
            load(source / _folder(name), set_active=False)
        if heads is True and (source / "head").is_dir() and load is not None:
            load(source / "head")


_FORMAT = "adapterhub"


def _folder(name: str) -> str:
    """A name as that of a directory; a path separator in it does not lead anywhere else."""
    quoted = quote(name, safe=_SAFE)
    return quoted if quoted.strip(".") else f"%{quoted}"


def _fuses(block: Block) -> list[Fuse]:
    return [inner for inner in block.blocks() if isinstance(inner, Fuse)]
