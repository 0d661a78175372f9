"""What the pages on prediction heads begin with."""

from __future__ import annotations

from typing import Any

import torch

from flexheads.testing import randomise

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [15, 16, 17, 18, 19, 20]])

AUTO = {
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
    "BertForMultipleChoice": "AutoModelForMultipleChoice",
    "BertForTokenClassification": "AutoModelForTokenClassification",
    "BertForQuestionAnswering": "AutoModelForQuestionAnswering",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "BertLMHeadModel": "AutoModelForCausalLM",
    "BertForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "BertForPreTraining": "AutoModelForPreTraining",
}


def prepare(model: Any, *names: str) -> Any:
    for number, name in enumerate(names or ("mrpc",)):
        model.add_classification_head(name, num_labels=2 + number)
        model.add_adapter(name, config="pfeiffer")
        randomise(model.adapters[name], std=0.2, seed=2 * number)
        randomise(model.heads[name], std=0.2, seed=2 * number + 1)
    model.set_active_adapters((names or ("mrpc",))[0])
    return model


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    return model(IDS, **kwargs).logits
