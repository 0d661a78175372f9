"""Language-model heads on the decoder of an encoder-decoder model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils.generic import ModelOutput

from flexheads.heads.language_modeling import LanguageModelConfig, LanguageModelHead
from flexheads.heads.source import Source
from flexheads.heads.written import written_texts


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SequenceToSequenceConfig(LanguageModelConfig):
    """Configuration of `SequenceToSequenceHead`: by default the output matrix alone."""

    layers: int = 1
    activation_function: str | None = None
    layer_norm: bool = False
    bias: bool = False


class SequenceToSequenceHead(LanguageModelHead):
    """Scores what the decoder writes. Logits are ``(batch, target sequence, vocabulary)``.

    Where a call has labels and no decoder inputs, the decoder reads the labels one step late.
    """

    head_type = "seq2seq_lm"
    needs = "decoder"
    config_class = SequenceToSequenceConfig
    generates = True
    writes_labels = True

    def output_class(self, output: ModelOutput) -> type[ModelOutput]:
        """See `LanguageModelHead.output_class`."""
        return Seq2SeqLMOutput

    def decode(  # type: ignore[override]  # its own options
        self, output: Any, source: Source | None = None, *, skip_special_tokens: bool = True
    ) -> list[Any]:
        """The text of what was generated.

        Args:
            output: What ``generate`` returned; or `forward`, whose likeliest tokens are taken.
            source: The ``tokenizer`` is needed.
            skip_special_tokens: Leaves out tokens such as padding.

        Returns:
            For each sequence its ``generated_text``.

        Raises:
            UnsupportedError: If there is no tokenizer.
        """
        if isinstance(output, Mapping) and "logits" in output and "sequences" not in output:
            output = output["logits"].argmax(dim=-1)
        return written_texts(output, source, skip_special_tokens=skip_special_tokens)
