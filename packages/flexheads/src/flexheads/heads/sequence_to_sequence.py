"""Language-model heads on the decoder of an encoder-decoder model."""

from __future__ import annotations

import dataclasses

from transformers.modeling_outputs import Seq2SeqLMOutput

from flexheads.heads.language_modeling import LanguageModelConfig, LanguageModelHead


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
    config_class = SequenceToSequenceConfig
    output_class = Seq2SeqLMOutput
    writes_labels = True
