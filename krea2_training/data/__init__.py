"""Pictures, captions and prompts: read, checked, and encoded once."""
