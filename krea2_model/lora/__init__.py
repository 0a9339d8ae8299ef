"""LoRA files, and what they do to weights."""
