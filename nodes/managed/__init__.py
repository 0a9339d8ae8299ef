"""What ComfyUI manages: MODEL, CLIP and VAE built from our implementation."""
