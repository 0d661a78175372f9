"""DINOv2 passes the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("dinov2")
def test_plain(check):
    check()


@architecture_checks("dinov2_with_registers")
def test_with_registers(check):
    check()
