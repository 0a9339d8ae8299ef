"""Pictures, sizes and masks. Knows no network."""
