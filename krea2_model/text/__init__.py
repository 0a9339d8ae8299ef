"""Qwen3-VL and prompts: tokens, weights, images, styles, captions. Knows no files."""
