"""The sections of settings, checked when they are made. Nothing here imports torch."""
