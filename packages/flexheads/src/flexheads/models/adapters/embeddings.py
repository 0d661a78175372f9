"""Named token embeddings, for vocabularies that the backbone was not trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexheads.checkpoints.store import staged
from flexheads.errors import CheckpointError, ConfigError, UnknownNameError
from flexheads.models.adapters.mixin import AdapterModelMixin

DEFAULT = "default"
_WEIGHTS, _TOKENIZER = "embedding.pt", "tokenizer"


class EmbeddingsMixin(AdapterModelMixin):
    """``add_embeddings`` and what belongs to it.

    The active embeddings are the backbone's own module; the others wait outside of the model, so
    a saved model has the active ones.
    """

    _waiting: dict[str, nn.Embedding]
    _active_embeddings: str = DEFAULT

    @property
    def active_embeddings(self) -> str:
        """The name of the embeddings in use; ``"default"`` are the backbone's own."""
        return self._active_embeddings

    @property
    def loaded_embeddings(self) -> dict[str, nn.Embedding]:
        """All embeddings by name."""
        return {**self._others(), self._active_embeddings: self._in_use()}

    def add_embeddings(
        self,
        name: str,
        tokenizer: Any,
        reference_embedding: str | None = None,
        reference_tokenizer: Any = None,
        embedding_dim: int | None = None,
    ) -> None:
        """Adds new embeddings and activates them.

        Args:
            name: Their name.
            tokenizer: The tokenizer whose vocabulary they are for.
            reference_embedding: Embeddings from which tokens that both tokenizers know are taken.
            reference_tokenizer: The tokenizer of those.
            embedding_dim: Their width; None is that of the embeddings in use.

        Raises:
            ConfigError: If the name is taken, or only one of the references is given.
            UnknownNameError: If the reference does not exist.
        """
        self._refuse_name(name)
        if (reference_embedding is None) != (reference_tokenizer is None):
            raise ConfigError("Give both reference_embedding and reference_tokenizer, or neither.")
        old = self._in_use().weight
        weight = torch.empty(len(tokenizer), embedding_dim or old.shape[1]).normal_(std=0.02)
        if reference_embedding is not None:
            known = self._named(reference_embedding).weight.detach().float().cpu()
            vocabulary, theirs = tokenizer.get_vocab(), reference_tokenizer.get_vocab()
            for token in vocabulary.keys() & theirs.keys():
                weight[vocabulary[token]] = known[theirs[token]]
        self._others()[name] = nn.Embedding.from_pretrained(weight)  # type: ignore[no-untyped-call]
        self.set_active_embeddings(name)

    def set_active_embeddings(self, name: str) -> None:
        """Puts embeddings into the backbone.

        Raises:
            UnknownNameError: If there are none of that name.
        """
        new, old, backbone = self._named(name), self._in_use(), self._attachment.backbone
        if new is old:
            return
        new.to(device=old.weight.device, dtype=old.weight.dtype)
        self._others().pop(name)
        self._others()[self._active_embeddings] = old
        backbone.set_input_embeddings(new)
        backbone.config.vocab_size = new.num_embeddings
        self._active_embeddings = name
        self._attachment.replace_host(old, new)

    def delete_embeddings(self, name: str) -> None:
        """Removes embeddings; where they were active, the default ones are.

        Raises:
            ConfigError: If they are the default ones.
            UnknownNameError: If there are none of that name.
        """
        self._named(name)
        if name == DEFAULT:
            raise ConfigError("The default embeddings are the backbone's own; they stay.")
        if name == self._active_embeddings:
            self.set_active_embeddings(DEFAULT)
        self._others().pop(name)

    def save_embeddings(self, path: str | Path, name: str, tokenizer: Any = None) -> None:
        """Saves embeddings, and a tokenizer beside them.

        Raises:
            UnknownNameError: If there are none of that name.
        """
        weight = self._named(name).weight
        with staged(Path(path)) as aside:
            torch.save(weight.detach().cpu().clone(), aside / _WEIGHTS)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(Path(path) / _TOKENIZER))

    def load_embeddings(self, path: str | Path, name: str) -> Any:
        """Loads embeddings and activates them.

        Args:
            path: The directory.
            name: Their name in this model.

        Returns:
            The tokenizer that was saved with them, or None.

        Raises:
            CheckpointError: If the directory holds none, or none of this model's width.
            ConfigError: If the name is taken.
        """
        self._refuse_name(name)
        weight = _read(Path(path) / _WEIGHTS)
        width = self._in_use().embedding_dim
        if weight.shape[1] != width:
            raise CheckpointError(
                f"{path}: the embeddings have width {weight.shape[1]}, this model has {width}."
            )
        folder, tokenizer = Path(path) / _TOKENIZER, None
        if folder.is_dir():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self._others()[name] = nn.Embedding.from_pretrained(weight)  # type: ignore[no-untyped-call]
        self.set_active_embeddings(name)
        return tokenizer

    # --- helpers --------------------------------------------------------------------------------

    def _others(self) -> dict[str, nn.Embedding]:
        return self.__dict__.setdefault("_waiting", {})  # type: ignore[no-any-return]

    def _in_use(self) -> nn.Embedding:
        embedding: nn.Embedding = self._attachment.backbone.get_input_embeddings()
        return embedding

    def _named(self, name: str) -> nn.Embedding:
        known = self.loaded_embeddings
        if name not in known:
            raise UnknownNameError("embeddings", name, known)
        return known[name]

    def _refuse_name(self, name: str) -> None:
        if name in self.loaded_embeddings:
            raise ConfigError(f"There are embeddings {name!r} already; choose another name.")


def _read(file: Path) -> Tensor:
    if not file.is_file():
        raise CheckpointError(f"There are no embeddings at {file}.")
    try:
        weight = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's errors, for files that hold more than tensors
        raise CheckpointError(f"Cannot read the embeddings in {file}: {error}") from error
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise CheckpointError(f"{file} should hold one matrix (vocabulary, width).")
    return weight.detach()
