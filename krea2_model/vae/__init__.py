"""The Qwen-Image VAE for single images."""
