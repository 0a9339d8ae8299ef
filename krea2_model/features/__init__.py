"""Arguments of a run beside prompt and size: checked, prepared, and applied in its steps."""
