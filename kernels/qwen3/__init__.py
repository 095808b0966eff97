"""The Qwen3 programs: what a checkpoint is, one step as dispatches, and the task graphs chips trace from them."""
