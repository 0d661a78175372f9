"""Parametrised hypercomplex multiplication: linear layers that are sums of Kronecker products.

``y = x H + b`` with ``H = sum_i kron(A_i, W_i)`` (Zhang et al. 2021, arXiv:2102.08597, section 3).
The "rule" ``A`` is ``(n, n, n)``, ``W`` is ``(n, in / n, out / n)``, ``n`` is `phm_dim`. Compacter
(Mahabadi et al. 2021, arXiv:2106.04647, section 3) shares ``A`` and factorises ``W``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexheads.errors import ConfigError
from flexheads.methods.bottleneck_config import BnConfig
from flexheads.sites.derived import Derived, look_together

_RULE, _WEIGHT = "phm_rule", "W"
_UNSHARED_RULE = 0.01
"""Spread of the rule of a layer that has one of its own, as in the code of the paper."""


class SharedPhm(nn.Module):
    """The tensors that the hypercomplex layers of one adapter share; it may hold none.

    Args:
        width: Hidden size.
        size: Size of the bottleneck.
        config: The adapter's configuration.
    """

    def __init__(self, width: int, size: int, config: BnConfig) -> None:
        super().__init__()
        self.kept: list[Derived[Tensor]] = []
        if config.shared_phm_rule:
            uniform = config.phm_c_init == "uniform"
            _add_rule(self, config, 1.0 if uniform else config.phm_init_range)
        if config.shared_W_phm:
            _add_weight(self, f"{_WEIGHT}_down", width, size, config)
            _add_weight(self, f"{_WEIGHT}_up", size, width, config, zero=True)


class PhmLinear(nn.Module):
    """One hypercomplex linear layer.

    The weight is computed once in each forward, for all tokens; in inference it is kept for the
    next. The up-projection starts at zero
    through its ``W``; where that is factorised, through the right factor only, so that it learns.

    Args:
        inputs: Size of what comes in.
        outputs: Size of what goes out.
        position: Which of the two projections it is.
        config: The adapter's configuration.
        shared: The shared tensors; None where the configuration shares nothing.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        position: Literal["down", "up"],
        config: BnConfig,
        shared: SharedPhm | None,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.position, self.config = inputs, outputs, position, config
        self._shared = (shared,)  # in a tuple: not its own
        self._kept: Derived[Tensor] = Derived()
        if shared is not None:
            shared.kept.append(self._kept)
            look_together(shared.kept)
        if not config.shared_phm_rule:
            _add_rule(self, config, _UNSHARED_RULE)
        if not config.shared_W_phm:
            _add_weight(self, _WEIGHT, inputs, outputs, config, zero=position == "up")
        self.b = nn.Parameter(torch.zeros(outputs)) if config.phm_bias else None

    def weight(self, like: Tensor) -> Tensor:
        """``H``, ``(inputs, outputs)``, where and in the precision in which `like` is."""
        config, shared = self.config, self._shared[0]
        if config.shared_phm_rule:
            rule = _factor(shared, _RULE, config.factorized_phm_rule).to(like)
        else:
            rule = _factor(self, _RULE, config.factorized_phm_rule)
        if config.shared_W_phm:
            word = f"{_WEIGHT}_{self.position}"
            weight = _factor(shared, word, config.factorized_phm_W).to(like)
        else:
            weight = _factor(self, _WEIGHT, config.factorized_phm_W)
        product = torch.einsum("iab,icd->acbd", rule, weight)
        return product.reshape(self.inputs, self.outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(batch, sequence, inputs)`` to ``(batch, sequence, outputs)``."""
        read: Any = (self, *filter(None, self._shared))
        weight = self._kept.get((), lambda: self.weight(next(self.parameters())), read=read)
        if weight is None or weight.dtype != hidden.dtype or weight.device != hidden.device:
            weight = self.weight(hidden)
        return nn.functional.linear(hidden, weight.T, self.b)


def check_phm(config: BnConfig, shapes: Collection[tuple[int, int]]) -> None:
    """Refuses sizes that hypercomplex layers cannot have.

    Args:
        config: The adapter's configuration.
        shapes: The hidden size and the size of the bottleneck, of every site.

    Raises:
        ConfigError: If a size cannot be divided, or what should be shared has several shapes.
    """
    for width, size in shapes:
        if width % config.phm_dim or size % config.phm_dim:
            raise ConfigError(
                f"phm_dim={config.phm_dim} must divide the hidden size, {width}, and the size of "
                f"the bottleneck, {size} with this reduction_factor; change one of them."
            )
    if config.shared_W_phm and len(shapes) > 1:
        raise ConfigError(
            f"shared_W_phm=True needs bottlenecks of one shape, but there are {sorted(shapes)}. "
            "Give all layers one reduction_factor."
        )


def _factor(owner: Any, name: str, factorised: bool) -> Tensor:
    tensor: Tensor
    if factorised:
        tensor = torch.bmm(getattr(owner, f"{name}_left"), getattr(owner, f"{name}_right"))
    else:
        tensor = getattr(owner, name)
    return tensor


def _add_rule(owner: nn.Module, config: BnConfig, spread: float) -> None:
    n = config.phm_dim
    shapes = {_RULE: (n, n, n)}
    if config.factorized_phm_rule:
        shapes = {f"{_RULE}_left": (n, n, 1), f"{_RULE}_right": (n, 1, n)}
    for name, shape in shapes.items():
        tensor = torch.empty(shape)
        if config.phm_c_init == "uniform":
            nn.init.uniform_(tensor, -spread, spread)
        else:
            nn.init.normal_(tensor, std=spread)
        if config.learn_phm:
            owner.register_parameter(name, nn.Parameter(tensor))
        else:
            owner.register_buffer(name, tensor)


def _add_weight(
    owner: nn.Module, name: str, inputs: int, outputs: int, config: BnConfig, zero: bool = False
) -> None:
    n, rank = config.phm_dim, config.phm_rank
    rows, columns = inputs // n, outputs // n
    shapes = {name: (n, rows, columns)}
    if config.factorized_phm_W:
        shapes = {f"{name}_left": (n, rows, rank), f"{name}_right": (n, rank, columns)}
    for word, shape in shapes.items():
        tensor = torch.zeros(shape)
        if not zero or word.endswith("_left"):
            for one in tensor:
                _draw(one, config)
        owner.register_parameter(word, nn.Parameter(tensor))


def _draw(matrix: Tensor, config: BnConfig) -> None:
    kind = config.hypercomplex_nonlinearity
    if kind == "glorot-uniform":
        nn.init.xavier_uniform_(matrix)
    elif kind == "normal":
        nn.init.normal_(matrix, std=config.phm_init_range)
    else:
        nn.init.xavier_normal_(matrix)
