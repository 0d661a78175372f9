"""Kinds of heads, and the inputs and labels that each of them takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .pairs import NAME, SEED, inputs


def labels(*shape: int, below: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(SEED))


def choice_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, 99, (2, 3, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def token_labels(below: int) -> Tensor:
    """With one position that does not count, and labels where the input is padding."""
    given = labels(3, 7, below=below)
    given[0, 1] = -100
    return given


def lm_labels() -> Tensor:
    """Padding does not count, because the peer counts whatever label it is given there."""
    return token_labels(99).masked_fill(inputs()["attention_mask"] == 0, -100)


IDS = {0: "negative", 1: "neutral", 2: "positive"}
ONE_OF_3 = {"labels": labels(3, below=3)}
ANSWERS = {
    "start_positions": torch.tensor([0, 3, 400]),
    "end_positions": torch.tensor([2, 6, 400]),
}
# No word hangs on the root, and 0 fills the rows: the peer counts neither.
TREES = {
    "word_starts": torch.tensor([[1, 2, 4, 7], [1, 3, 6, 0], [2, 3, 0, 0]]),
    "labels_arcs": functional.pad(torch.tensor([[2, 3, 1], [2, 1, 0], [1, 0, 0]]), (0, 4)),
    "labels_rels": functional.pad(torch.tensor([[1, 0, 3], [0, 2, 0], [3, 0, 0]]), (0, 4)),
}
# The method that adds the head, its arguments, and the labels.
HEADS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "classification": ("classification", {"num_labels": 3}, ONE_OF_3),
    "classification_1": ("classification", {"num_labels": 3, "layers": 1}, ONE_OF_3),
    "classification_3": (
        "classification",
        {"num_labels": 3, "layers": 3, "activation_function": "relu", "id2label": IDS},
        ONE_OF_3,
    ),
    "classification_linear": (
        "classification",
        {"num_labels": 3, "activation_function": None},
        ONE_OF_3,
    ),
    "classification_pooler": ("classification", {"num_labels": 3, "use_pooler": True}, ONE_OF_3),
    "regression": ("classification", {"num_labels": 1}, {"labels": torch.rand(3).double()}),
    "multilabel": (
        "classification",
        {"num_labels": 4, "multilabel": True},
        {"labels": labels(3, 4, below=2)},
    ),
    "multiple_choice": ("multiple_choice", {"num_choices": 3}, {"labels": labels(2, below=3)}),
    "multiple_choice_pooler": (
        "multiple_choice",
        {"num_choices": 3, "layers": 1, "use_pooler": True},
        {"labels": labels(2, below=3)},
    ),
    "tagging": ("tagging", {"num_labels": 5}, {"labels": token_labels(5)}),
    "tagging_2": (
        "tagging",
        {"num_labels": 3, "layers": 2, "id2label": IDS, "activation_function": "gelu"},
        {"labels": token_labels(3)},
    ),
    "question_answering": ("qa", {}, ANSWERS),
    "question_answering_2": ("qa", {"layers": 2}, ANSWERS),
    "dependency_parsing": ("dependency_parsing", {"num_labels": 4}, TREES),
    "masked_lm": ("masked_lm", {}, {"labels": lm_labels()}),
    "masked_lm_1": ("masked_lm", {"layers": 1}, {"labels": lm_labels()}),
    "masked_lm_3": (
        "masked_lm",
        {"layers": 3, "activation_function": "relu"},
        {"labels": lm_labels()},
    ),
    "causal_lm": ("causal_lm", {}, {"labels": lm_labels()}),
    "causal_lm_1": ("causal_lm", {"layers": 1}, {"labels": lm_labels()}),
}


def head_inputs(kind: str) -> dict[str, Tensor]:
    method, _, own = HEADS[kind]
    return {**(choice_inputs() if method == "multiple_choice" else inputs()), **own}


def add_head(model: Any, kind: str, name: str = NAME) -> None:
    method, arguments, _ = HEADS[kind]
    getattr(model, f"add_{method}_head")(name, **arguments)
