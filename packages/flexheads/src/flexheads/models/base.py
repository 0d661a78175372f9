"""What the mixins of this package may rely on: the transformers model that they are mixed into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:

    class TransformersModel(nn.Module):
        """The parts of a transformers model that the mixins use."""

        config: Any
        base_model_prefix: str

else:
    TransformersModel = object
