"""What actors say to each other: one module per conversation."""
