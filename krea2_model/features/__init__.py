"""What a run takes beside prompt and size: checked, prepared, and applied in its steps."""
