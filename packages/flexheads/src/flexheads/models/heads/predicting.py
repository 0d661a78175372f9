"""From samples to what a head says of them: batches, windows, one result for each."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from flexheads.composition import Rows, Setup, parse_composition
from flexheads.errors import CompositionError, ConfigError, UnknownNameError
from flexheads.heads.base import PredictionHead
from flexheads.heads.inputs import Limits, Piece, Samples
from flexheads.heads.rows import pad_rows, source_of
from flexheads.heads.source import Source
from flexheads.heads.windows import best, join
from flexheads.models.heads.methods import HeadsMixin
from flexheads.models.heads.processors import longest, processor_for, samples_for
from flexheads.routing import route

_PATIENCE = 2.0
"""Seconds after which a progress bar is worth its lines."""

_OF_BACKBONE = ("hidden_states", "attentions", "past_key_values", "last_hidden_state")


class PredictMixin(HeadsMixin):
    """Predictions from samples as people have them.

    What a sample looks like is up to the head's type: a text, a list of its words, a tuple of two
    texts; for question answering ``(question, context)`` or ``{"question", "context"}``; for
    multiple choice ``(prompt, choices)`` or ``{"prompt", "choices"}``. On models of images it is an
    image, on models of sound a row of numbers.

    Nothing is trained or changed, dropout is off, and any number of threads may predict at once. A
    model in training mode stays in it: a copy that shares all tensors does the work.
    """

    def predict(
        self,
        head: str,
        samples: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 32,
        adapter_names: Setup = None,
        max_length: int | None = None,
        stride: int | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """What a head says of samples, in plain Python values.

        Args:
            head: The head's name.
            samples: Any number of samples, or one alone (a string, a tuple or a mapping).
            tokenizer: The tokenizer, image processor, feature extractor or processor; None loads
                what was saved with the model.
            batch_size: How many samples, or windows of long ones, the model reads at once.
            adapter_names: The adapters, as for `forward`; of `Rows` each entry belongs to one
                sample. None takes the adapter that is called like the head, or else what is active.
            max_length: Tokens of a row; None is what model and tokenizer allow.
            stride: Tokens that two windows share; None is 128, or half of a window if less.
            progress: Whether to show a progress bar; None shows one when it takes long.
            options: Options of the type's `decode`, such as ``top_k``.

        Returns:
            What `decode` gives for each sample, in their order; of one alone that alone.

        Raises:
            UnknownNameError: If there is no such head, adapter or option.
            UnsupportedError: If the type does not decode, or needs another kind of tokenizer.
            ConfigError: If a sample looks otherwise, or there is no tokenizer.
            CompositionError: If the adapters share a batch out among them.
        """
        alone = isinstance(samples, str | Mapping | tuple)
        given = [samples] if alone else list(samples)
        work = self._work(head, options, adapter_names, tokenizer, len(given))
        limit = longest(self, work.processor) if max_length is None else max_length
        results = work.run(given, Limits(limit, stride), batch_size, progress)
        return results[0] if alone else results

    def _work(
        self,
        head: str,
        options: Mapping[str, Any],
        adapter_names: Setup,
        tokenizer: Any,
        count: int,
    ) -> _Work:
        """What one call of `predict` has to do, once it is clear that it can be done."""
        module, inputs = self.heads[head], self._attachment.spec.inputs
        _check_decoding(module, options)
        setup = self._setup_of_predict(head, adapter_names, count)
        kind = samples_for(module, inputs)
        found = processor_for(self, inputs) if tokenizer is None and count else tokenizer
        return _Work(_at_rest(self), module, kind, found, setup, options)

    def _setup_of_predict(self, head: str, adapter_names: Setup, count: int) -> Setup:
        """The setup of every batch; None is what is active, with the layers that are skipped.

        Raises:
            CompositionError: If it shares out a batch, because the batches are made here.
        """
        named = adapter_names is not None or head in self.adapters
        active = self._attachment.runtime.chosen()
        wanted = adapter_names if adapter_names is not None else head
        block = parse_composition(wanted) if named else active.setup
        if isinstance(block, Rows):
            if len(block) != count:
                raise CompositionError(
                    f"Rows names {len(block)} rows, but there are {count} samples."
                )
        elif not route(block).single:
            raise CompositionError(
                f"{block!r} shares a batch out among adapters, and predict makes the batches. Name "
                "one setup with adapter_names=, or one for each sample with Rows."
            )
        for name in () if block is None else block.names():
            self.get_adapter(name)
        if not named and active.skip_layers:
            return None
        return [] if block is None else block


@dataclasses.dataclass
class _Work:
    """The model at work on the batches of one call, and what it has said so far."""

    model: Any
    head: PredictionHead
    kind: Samples
    processor: Any
    setup: Setup
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.said: dict[int, list[Any]] = {}
        self.windows: dict[int, list[tuple[Piece, Any]]] = {}

    def run(
        self, samples: Sequence[Any], limits: Limits, batch_size: int, progress: bool | None
    ) -> list[Any]:
        """What the head says of each sample."""
        if type(batch_size) is not int or batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r} should be a whole number, at least 1.")
        pieces = self.kind.pieces(self.processor, samples, limits) if samples else []
        with _bar(len(pieces), progress) as bar:
            for batch in _batches(pieces, batch_size):
                self.batch(batch)
                bar.update(len(batch))
        return self.results(len(samples))

    def batch(self, pieces: Sequence[Piece]) -> None:
        """Runs the model on some pieces; windows that will be joined wait for the others."""
        inputs, source = self.kind.batch(self.processor, pieces)
        output = _at_hand(self._call(pieces, inputs))
        if not _is_joined(self.kind, pieces[0]):
            parts = pieces[0].parts
            self._take([piece.sample for piece in pieces], output, source, parts)
            return
        for index, piece in enumerate(pieces):
            own = _row_of(output, index, len(pieces), piece.length)
            self.windows.setdefault(piece.sample, []).append((piece, own))

    def results(self, count: int) -> list[Any]:
        """What the head has said of each sample, with its windows put together."""
        for sample, windows in self.windows.items():
            rows = [piece.content[0] for piece, _ in windows]
            outputs = [output for _, output in windows]
            row, output = join(rows, outputs, windows[0][0].shared)
            inputs = pad_rows([row], self.processor)
            self._take([sample], output, source_of([row], inputs, self.processor))
        return [self._best(self.said[sample]) for sample in range(count)]

    def _best(self, said: Sequence[Any]) -> Any:
        """What counts of what was said of the pieces of one sample."""
        if len(said) == 1:
            return said[0]
        ranked = best(said, self.options.get("top_k") or 1)
        return ranked if self.options.get("top_k") else ranked[0]

    def _take(self, samples: Sequence[int], output: Any, source: Source, parts: int = 1) -> None:
        options = dict(self.options)
        if parts > 1:  # one more, because the best may be that a window has none
            options["top_k"] = (options.get("top_k") or 1) + 1
        found = self.head.decode(output, source, **options)
        for sample, result in zip(samples, found, strict=True):
            self.said.setdefault(sample, []).append(result)

    def _call(self, pieces: Sequence[Piece], inputs: Mapping[str, Any]) -> Any:
        model, setup = self.model, self.setup
        names = {*model.input_names, *self.head.label_names}
        arguments: dict[str, Any] = {
            name: value.to(model.device) for name, value in inputs.items() if name in names
        }
        if "use_cache" in names:
            arguments["use_cache"] = False
        if isinstance(setup, Rows):
            setup = Rows([setup[piece.sample] for piece in pieces for _ in range(piece.rows)])
        start = getattr(model.config, "decoder_start_token_id", None)
        decodes = "decoder_input_ids" in names and self.head.config.side is None
        if decodes and "input_ids" not in arguments and start is not None:
            # Heads of models that listen read the decoder, which then begins to write.
            arguments["decoder_input_ids"] = torch.full(
                (len(pieces), 1), start, device=model.device
            )
        how: dict[str, Any] = {"head": self.head.name, "return_dict": True}
        # Not inference mode: what a backbone keeps between calls could never be trained with.
        with torch.no_grad():
            return model(**arguments, adapter_names=setup, **how)


def _check_decoding(head: PredictionHead, options: Mapping[str, Any]) -> None:
    """Refuses, before anything is computed, what the head would refuse behind it."""
    if type(head).decode is PredictionHead.decode:
        head.decode(None)
    parameters = [*inspect.signature(head.decode).parameters.values()][2:]
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if (unknown := [name for name in options if name not in known]) and (known or not parameters):
        raise UnknownNameError(f"option of heads of type {head.head_type!r}", unknown[0], known)


def _at_rest(model: Any) -> Any:
    """The model without dropout.

    A model in training mode is left alone, because others may be using it: what comes back then is
    a copy of its modules that shares all their tensors.
    """
    if not any(module.training for module in model.modules()):
        return model
    tensors = (*model.parameters(), *model.buffers())
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, shared).eval()


def _is_joined(kind: Samples, piece: Piece) -> bool:
    return kind.long == "join" and piece.parts > 1


def _batches(pieces: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    """Pieces of about one length together, the longest first; only of one shape, too."""

    def shape(piece: Piece) -> tuple[bool, int]:
        return piece.parts > 1, piece.rows

    for own in dict.fromkeys(map(shape, pieces)):
        alike = [piece for piece in pieces if shape(piece) == own]
        alike.sort(key=lambda piece: piece.length, reverse=True)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _bar(total: int, progress: bool | None) -> Any:
    """A progress bar, unless transformers' own are switched off."""
    waits = {} if progress else {"delay": _PATIENCE}
    return logging.tqdm(total=total, disable=progress is False, unit="piece", **waits)


def _at_hand(output: Any) -> Any:
    """What the head has said, on the CPU, in a dtype that everything can compute with."""
    if not isinstance(output, ModelOutput):
        return output
    own = {k: v for k, v in output.items() if not k.endswith(_OF_BACKBONE)}
    return type(output)(**{name: _plain(value) for name, value in own.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    if not isinstance(value, Tensor):
        return value
    return value.float().cpu() if value.is_floating_point() else value.cpu()


def _row_of(output: Any, index: int, rows: int, length: int) -> Any:
    """One row of an output, without its padding."""

    def own(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows

    fields = {name: value for name, value in output.items() if own(value)}
    return type(output)(**{n: value[index : index + 1, :length] for n, value in fields.items()})
