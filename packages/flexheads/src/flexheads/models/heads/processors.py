"""What turns samples into a model's inputs, where the user gives none: loaded beside the model."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.utils.hub import cached_file

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.heads.inputs import Samples
from flexheads.heads.media import Images, Sounds
from flexheads.specs import Inputs

_LOADERS = {
    "tokens": ("AutoTokenizer", "tokenizer"),
    "pixels": ("AutoImageProcessor", "image processor"),
    "features": ("AutoProcessor", "processor"),
    "waveform": ("AutoProcessor", "processor"),
}
_QUIET = tuple(
    f"_raise_exceptions_for_{what}"
    for what in ("missing_entries", "gated_repo", "connection_errors")
)
_LARGE = 10**6
"""Tokenizers that know no limit say a number far above this."""


def processor_for(model: Any, inputs: Inputs) -> Any:
    """The tokenizer, image processor or feature extractor that was saved with the model.

    Args:
        model: The model; its configuration says where it came from.
        inputs: What it reads.

    Raises:
        ConfigError: If there is none.
    """
    loader, what = _LOADERS[inputs]
    path = getattr(model.config, "name_or_path", "")
    if not path:
        raise ConfigError(
            f"No {what} was given, and the model does not know where it came from "
            f"(config.name_or_path is empty). Pass tokenizer=, the {what} that it was trained with."
        )
    try:
        found = getattr(transformers, loader).from_pretrained(path)
        if inputs == "tokens":
            _check_vocabulary(path, found)
        return found
    except Exception as error:  # whatever is wrong with the files, or with the way to them
        raise ConfigError(
            f"No {what} was given, and {path!r} gives none: {str(error).splitlines()[0]} Pass "
            f"tokenizer=, the {what} that the model was trained with."
        ) from error


def _check_vocabulary(path: str, tokenizer: Any) -> None:
    """Refuses a tokenizer that was made of nothing, as newer transformers do where files lack.

    Raises:
        ConfigError: If none of its files is there.
    """
    names = {"tokenizer.json", *getattr(tokenizer, "vocab_files_names", {}).values()}
    quiet: dict[str, Any] = dict.fromkeys(_QUIET, False)
    if not any(cached_file(path, name, **quiet) for name in names):
        raise ConfigError(f"none of {', '.join(sorted(names))} is there.")


def samples_for(head: Any, inputs: Inputs) -> Samples:
    """What the samples of a head are on a model that reads `inputs`.

    Raises:
        UnsupportedError: If that are two things at once.
    """
    if inputs == "tokens":
        found: Samples = head.samples
        return found
    if inputs == "pixels":
        return Images()
    if inputs in ("features", "waveform"):
        return Sounds()
    raise UnsupportedError("predict does not know models of texts and images; call the model.")


def longest(model: Any, processor: Any) -> int | None:
    """How many tokens a row can have; None where nothing limits it."""
    known = [getattr(processor, "model_max_length", None), _positions(model)]
    limits = [int(limit) for limit in known if limit is not None and limit < _LARGE]
    return min(limits, default=None)


def _positions(model: Any) -> int | None:
    """How many positions the model has; some tables keep their first rows for padding."""
    count = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(count, int) or count < 1:
        return None
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        padding = getattr(module, "padding_idx", None)
        if "position" in last and padding is not None and len(module.weight) == count:
            return count - int(padding) - 1
    return count
