"""LoRA files and LoRA arithmetic."""
