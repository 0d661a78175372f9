"""Wav2Vec2, HuBERT and WavLM pass the checks that every architecture passes."""

import pytest

from flexheads.testing import architecture_checks

# What WavLM hands to torch is on its way out there.
MASKS = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")


@architecture_checks("wav2vec2")
def test_wav2vec2(check):
    check()


@architecture_checks("hubert")
def test_hubert(check):
    check()


@MASKS
@architecture_checks("wavlm")
def test_wavlm(check):
    check()
