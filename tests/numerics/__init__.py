"""Every method on every kind of architecture, in every way of running it; minutes long."""
