"""BERT as a decoder, in both of its families."""

from flexheads.testing import decoder_checks


@decoder_checks("BertLMHeadModel", "BertGenerationDecoder")
def test_decoder(check):
    check()
