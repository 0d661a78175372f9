"""Low-rank adaptation in AdapterHub files."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexheads.checkpoints.bundle import Layout
from flexheads.checkpoints.hub.names import AdapterNames
from flexheads.errors import CheckpointError
from flexheads.methods.lora_configs import ANCHORED, MATRICES

TAGS = ("lora", "mtl_lora")

_OWN_FIELDS = ("rank_stabilized", "vera_dense")
_FIELDS = {"mlp_in": "intermediate_lora", "mlp_out": "output_lora"}
_UNSCALED = "unscaled mlp"
_JOINED = ("lora_A", "lora_B", "m.weight", "gate.weight", "gate.bias")
"""What a projection that computes several at once holds for all of them, one below the other."""


def hub_fields(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """A configuration of this family in the fields of the `adapters` library.

    That one knows neither another scaling nor initialisations that must be taken out again: these
    become another `alpha` and a product of twice the rank.
    """
    fields = {key: value for key, value in config.items() if key not in _OWN_FIELDS}
    rank = config["r"]
    scale = config["alpha"] / (math.sqrt(rank) if config.get("rank_stabilized") else rank)
    if config["init_weights"] in ANCHORED:
        fields |= {"init_weights": "lora", "r": 2 * rank, "alpha": scale * 2 * rank}
    elif config.get("rank_stabilized") and config["composition_mode"] == "add":
        fields["alpha"] = scale * rank
    return own_fields(fields, layout)


def own_fields(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The library's fields with its names for projections replaced by ours; its own inverse."""
    names = {_FIELDS[r]: _FIELDS[layout.renamed.get(r, r)] for r in _FIELDS}
    return {names.get(key, key): value for key, value in config.items()}


def scaled_as_before(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The configuration of a release that scaled only where a module computes several projections.

    Elsewhere a factor of one stands for that. Where an adapter has both, `LoRANames` puts the
    factor into the matrices of those that were not scaled.
    """
    fused = any(
        role.rpartition(".")[2] == "query" and is_fused(layout, path)
        for role, path in layout.paths.items()
    )
    if not (fused and config["selfattn_lora"]):
        return {**config, "alpha": config["r"]}
    if config["intermediate_lora"] or config["output_lora"]:
        return {**config, _UNSCALED: True}
    return dict(config)


def check_whole(config: Mapping[str, Any]) -> None:
    """Refuses what the `adapters` library trains where queries, keys and values take turns.

    Raises:
        CheckpointError: If the configuration adapts them.
    """
    if config.get("selfattn_lora"):
        raise CheckpointError(
            "The adapters library cuts this architecture's projection of queries, keys and values "
            "into thirds, but they take turns in it, head by head. So what this file changes is "
            "neither; there is nothing here that it could be read as. Train the adapter again."
        )


def is_fused(layout: Layout, path: str) -> bool:
    """Whether the module at a path computes several projections."""
    return len(layout.sites.get(path, ())) > 1


class LoRANames(AdapterNames):
    """The parts' own names are those of the files, but for three forms.

    VeRA's vectors are square matrices there. Factors that are taken out of a product follow the
    learned ones in a product of twice the rank. And a module that computes several projections has
    one set of matrices, with those of each projection one below the other.
    """

    infix = "loras"

    def shared_address(self, suffix: str) -> str | None:
        return f"shared.vera.{suffix}" if suffix in ("lora_A", "lora_B") else None

    # --- writing --------------------------------------------------------------------------------

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        by_path: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        written: dict[str, Tensor] = {}
        for address, tensor in tensors.items():
            if address.startswith("shared."):
                written[self.keys(address)[0]] = tensor
                continue
            site = self.site(address)
            by_path[self.layout.paths[site]][site][address[len(site) + 1 :]] = tensor
        for path, sites in by_path.items():
            forms = {site: self._file_form(own) for site, own in sites.items()}
            stem = f"{self.prefix}{path}.{self.infix}.{self.name}."
            written |= {f"{stem}{key}": t for key, t in self._joined(path, forms).items()}
        return written

    def _file_form(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one site as a file holds them."""
        own = dict(own)
        if "initial_A" in own:
            down, up = own.pop("initial_A"), own.pop("initial_B")
            own["lora_A"] = torch.cat([own["lora_A"], down])
            own["lora_B"] = torch.cat([own["lora_B"], -up], dim=1)
        for word in ("vera_D", "vera_B"):
            if word in own and own[word].ndim == 1:
                own[word] = own[word].diag()
        return own

    def _joined(self, path: str, forms: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        if not is_fused(self.layout, path):
            return next(iter(forms.values()))
        joined = {}
        order = [site for site in self.layout.paths if site in forms]
        for suffix in forms[order[0]]:
            tensors = [forms[site][suffix] for site in order]
            alike = len({tensor.shape[:1] for tensor in tensors}) == 1
            if suffix in _JOINED and tensors[0].ndim <= 2 and alike:
                joined[suffix] = torch.cat(tensors)
            else:  # for which that library has no form
                roles = [site.rpartition(".")[2] for site in order]
                joined |= {f"{r}.{suffix}": t for r, t in zip(roles, tensors, strict=True)}
        return joined

    # --- reading --------------------------------------------------------------------------------

    def read(self, raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The adapter's tensors by logical address, and the keys that have no place.

        The configuration is what the tensors say: it gets ``vera_dense`` where square matrices are
        no diagonals any more, and loses the letter ``"o"`` where there is nothing for it.
        """
        tensors: dict[str, Tensor] = {}
        unexpected = []
        for key, tensor in raw.items():
            found = self._own_form(key, tensor)
            if found is None:
                unexpected.append(key)
            else:
                tensors |= found
        if self.config.get("init_weights") in ANCHORED:
            tensors = self._split_initial(tensors)
        if self.config.get(_UNSCALED):
            self.config = {k: v for k, v in self.config.items() if k != _UNSCALED}
            factor = self.config["r"] / self.config["alpha"]
            outside = [a for a in tensors if ".mlp_" in a and a.endswith(".lora_B")]
            tensors |= {address: tensors[address] * factor for address in outside}
        self._forget_outputs(tensors)
        return self._vectors(tensors), unexpected

    def _own_form(self, key: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """The tensors that one tensor of a file holds; None where it has no place."""
        modern = self.modern(key)
        path, found, suffix = modern.partition(f".{self.infix}.{self.name}.")
        sites = self.layout.sites.get(path, ()) if found else ()
        if not is_fused(self.layout, path) or not sites:
            address = self.address(key)
            return {address: tensor} if address else None
        adapted = [site for site in sites if site.rpartition(".")[2] in self._roles]
        role, _, rest = suffix.partition(".")
        for site in adapted:
            if site.endswith(f".{role}"):
                return {f"{site}.{rest}": tensor}
        if not adapted or suffix not in _JOINED:
            return None
        blocks = tensor.tensor_split(len(adapted))
        return {f"{s}.{suffix}": block for s, block in zip(adapted, blocks, strict=True)}

    def _split_initial(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        split = {}
        for address, tensor in tensors.items():
            site, _, word = address.rpartition(".")
            if word == "lora_A":
                split[address], split[f"{site}.initial_A"] = tensor.tensor_split(2)
            elif word == "lora_B":
                split[address], up = tensor.tensor_split(2, dim=1)
                split[f"{site}.initial_B"] = -up
            else:
                split[address] = tensor
        return split

    def _forget_outputs(self, tensors: Mapping[str, Tensor]) -> None:
        """The library takes the letter for an attention's output, but adapts nothing there."""
        letters = list(self.config.get("attn_matrices", ()))
        if "o" in letters and not any(f".{MATRICES['o']}." in address for address in tensors):
            letters.remove("o")
            self.config = {**self.config, "attn_matrices": letters}

    def _vectors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The diagonals of square matrices, if all are diagonal."""
        squares = {a: t for a, t in tensors.items() if a.endswith((".vera_D", ".vera_B"))}
        if not squares or self.config.get("vera_dense"):
            return tensors
        if all(t.ndim == 2 and torch.equal(t, t.diag().diag()) for t in squares.values()):
            return tensors | {address: tensor.diag() for address, tensor in squares.items()}
        self.config = {**self.config, "vera_dense": True}
        return tensors

    @property
    def _roles(self) -> set[str]:
        """The roles in an attention that the configuration adapts."""
        letters = self.config.get("attn_matrices", ()) if self.config.get("selfattn_lora") else ()
        roles = {MATRICES[letter] for letter in letters}
        return roles | {f"cross_{role}" for role in roles}
