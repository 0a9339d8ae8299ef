"""Latent formats for live previews; ComfyUI's own is that of the released VAE."""

import comfy.latent_formats

from ...krea2_model.config import TransformerConfig
from ...krea2_model.nano.preview import TRANSFORMER_CONFIG, as_factors_read, cell_colours


class NanoLatents(comfy.latent_formats.Wan21):
    """Latents of krea2-nano: normalised as all of Krea 2's, in colours of their own."""

    def __init__(self):
        super().__init__()
        # Preview decoders (TAESD) exist for the released VAE only.
        self.taesd_decoder_name = None
        factors, bias = cell_colours()
        self.latent_rgb_factors, self.latent_rgb_factors_bias = factors.tolist(), bias.tolist()
        if hasattr(comfy.latent_formats.LatentFormat, "latent_rgb_factors_reshape"):
            self.latent_rgb_factors_reshape = as_factors_read


def latent_format(config: TransformerConfig):
    """The latent format of a transformer, where it is not the family's own; else None."""
    return NanoLatents() if config == TRANSFORMER_CONFIG else None
