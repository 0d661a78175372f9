"""A sequence is pooled at its last token that is no padding, on whichever side the padding is."""

import pytest
import torch

from flexheads.testing import tiny_model

IDS = torch.tensor([[0, 0, 5, 6], [5, 6, 0, 0], [5, 6, 7, 8]])
MASK = (IDS != 0).long()
LAST = torch.tensor([3, 1, 3])


@torch.no_grad()
@pytest.mark.parametrize("given", [{"attention_mask": MASK}, {}], ids=["mask", "pad_token_id"])
def test_the_last_token_that_is_no_padding(given):
    model = tiny_model("gpt2")
    model.add_classification_head("a", layers=1)
    hidden = model(IDS, **given, head=[]).last_hidden_state[torch.arange(3), LAST]
    torch.testing.assert_close(model(IDS, **given).logits, model.heads["a"].layers(hidden))


@torch.no_grad()
def test_the_mask_counts_before_the_tokens():
    model = tiny_model("gpt2")
    model.add_classification_head("a", layers=1)
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    hidden = model(IDS, attention_mask=mask, head=[]).last_hidden_state
    expected = model.heads["a"].layers(hidden[torch.arange(3), torch.tensor([2, 0, 3])])
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits, expected)


@torch.no_grad()
def test_without_any_sign_of_padding_the_last_token_counts():
    model = tiny_model("gpt2", pad_token_id=None)
    model.add_classification_head("a", layers=1)
    hidden = model(IDS, head=[]).last_hidden_state[:, -1]
    torch.testing.assert_close(model(IDS).logits, model.heads["a"].layers(hidden))


@torch.no_grad()
def test_left_padding_changes_nothing():
    model = tiny_model("gpt2")
    model.add_classification_head("a")
    padded = torch.tensor([[0, 0, 5, 6, 7]])
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got, model(padded[:, 2:]).logits)
