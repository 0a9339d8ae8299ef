"""MODEL, CLIP and VAE under ComfyUI's model management, built from our implementation."""
