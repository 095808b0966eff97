"""A preload that cannot be imported."""

raise RuntimeError("no such accelerator")
