"""Features of a frozen backbone, computed once and kept: heads then train on them."""
