"""RoBERTa and its relatives as decoders."""

from flexheads.testing import decoder_checks


@decoder_checks(
    "RobertaForCausalLM",
    "XLMRobertaForCausalLM",
    "CamembertForCausalLM",
    "XLMRobertaXLForCausalLM",
)
def test_decoder(check):
    check()
