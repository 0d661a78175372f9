"""CLIP and its towers pass the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("clip_text_model")
def test_text(check):
    check()


@architecture_checks("clip_vision_model")
def test_vision(check):
    check()


@architecture_checks("clip")
def test_both(check):
    check()
