"""The Krea 2 transformer, and what its attention may do more."""
