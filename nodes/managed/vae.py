"""VAE: our Qwen-Image VAE under ComfyUI's model management."""

import logging
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch

from ...krea2_model.checkpoints.checkpoint import Checkpoint
from ...krea2_model.checkpoints.identify import VAE, WHERE, CheckpointError
from ...krea2_model.checkpoints.vae import read_vae
from ...krea2_model.checkpoints.vae_keys import restore_temporal
from ...krea2_model.config import VAEConfig
from ...krea2_model.vae.model import MAX_SCORE_BYTES, QwenImageVAE, tiled_bytes
from .checkpoint import check_weights, open_part
from .layers import comfy_layers
from .memory import advise

# Tile sides in pixels that are tried in turn when memory runs out: large ones compute less twice.
FALLBACK_TILES = (1024, 512, 256)
_REMEDY = (
    "There are no tiles below 256 px to go on with: close what else uses the device, or start "
    "ComfyUI with --cpu-vae."
)


class Krea2VAE(comfy.sd.VAE):
    """ComfyUI's VAE object around the 2D Qwen-Image VAE.

    Unlike core, a batch is a batch of images and not a video: 4 images encode to 4 latents. Latents
    are (B, 16, 1, h, w) and not normalised, as ComfyUI's Wan21 latent format expects.
    """

    def __init__(self, state, dtype=None, device=None, disable_dynamic=False):
        # comfy.sd.VAE offers no way in for other models, so its fields are set here.
        management, config = comfy.model_management, state.config
        self.downscale_ratio, self.upscale_ratio = config.downscale, config.decoded_cell
        self.downscale_index_formula = self.upscale_index_formula = None
        self.latent_channels, self.latent_dim = config.z_dim, 2
        self.output_channels, self.pad_channel_value = config.image_channels, 1.0
        self.working_dtypes = [torch.bfloat16, torch.float16, torch.float32]
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.memory_used_encode = lambda shape, dtype: self._activations(shape, 1, dtype)
        self.memory_used_decode = lambda shape, dtype: self._activations(
            shape, config.downscale, dtype
        )
        self.crop_input, self.not_video, self.handles_tiling = True, True, False
        self.disable_offload, self.extra_1d_channel, self.format_encoded = False, None, None
        self.audio_sample_rate, self.size = 44100, None

        self.device = device or management.vae_device()
        self.output_device = management.intermediate_device()
        self.vae_dtype = dtype or management.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model = QwenImageVAE(
            config, comfy_layers(comfy.ops.disable_weight_init), device="meta"
        )
        self.first_stage_model.load_state_dict(state.tensors, strict=True, assign=True)
        self.first_stage_model.requires_grad_(False).eval().to(self.vae_dtype)
        management.archive_model_dtypes(self.first_stage_model)
        patcher = comfy.model_patcher.CoreModelPatcher
        if disable_dynamic:
            patcher = comfy.model_patcher.ModelPatcher
        self.patcher = patcher(
            self.first_stage_model,
            load_device=self.device,
            offload_device=management.vae_offload_device(),
        )
        self.model_size()

    def decode(self, samples_in, vae_options={}):  # noqa: B006 - core's signature
        """Latents (B, 16, 1, h, w) or (B, 16, h, w) to images (B, H, W, 3) in [0, 1]."""
        latents = self._latents(samples_in)
        memory = self.memory_used_decode(latents.shape, self.vae_dtype)
        whole = self._load_for(memory, latents.shape, self._decode_whole)
        return self._with_fallback(latents, whole, self._decode_tiles, self._to_images)

    def decode_tiled(
        self, samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None
    ):
        """As `decode`, in square tiles; sizes are in latent cells, as core passes them."""
        latents = self._latents(samples)
        tile, overlap = self._tiling(tile_x, tile_y, overlap, self.downscale_ratio)
        self._load(self._tile_activations(latents.shape, tile))
        with comfy.model_management.cuda_device_context(self.device):
            return self._to_images(self._decode_tiles(latents.to(self.device), tile, overlap))

    def encode(self, pixel_samples):
        """Images (B, H, W, C) in [0, 1] to latents (B, 16, 1, h, w)."""
        images = self._images(pixel_samples)
        memory = self.memory_used_encode(images.shape, self.vae_dtype)
        whole = self._load_for(memory, self._cells(images), self._encode_whole)
        return self._with_fallback(images, whole, self._encode_tiles, self._to_latents)

    def encode_tiled(
        self, pixel_samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None
    ):
        """As `encode`, in square tiles; sizes are in pixels, as core passes them."""
        images = self._images(pixel_samples)
        tile, overlap = self._tiling(tile_x, tile_y, overlap, 1)
        self._load(self._tile_activations(self._cells(images), tile))
        with comfy.model_management.cuda_device_context(self.device):
            return self._to_latents(self._encode_tiles(images.to(self.device), tile, overlap))

    def get_sd(self):
        """The weights as VAE files have them, for saving; exact for single images only."""
        model = self.first_stage_model
        return restore_temporal(model.state_dict(), model.config)

    def spacial_compression_decode(self):
        return self.upscale_ratio

    def spacial_compression_encode(self):
        return self.downscale_ratio

    def temporal_compression_decode(self):
        return None

    def _activations(self, shape, scale: int, dtype) -> float:
        """Bytes that one image takes, of a shape in units of `scale` pixels, and a workspace.

        The peak of encoder and decoder is at full size, 3.5 times the first width: an upsampled
        image, its source, and the convolution's output. Where norms are not fused, 8 times.
        """
        widths = 3.5 if self.device.type == "cuda" else 8
        pixels = shape[-2] * shape[-1] * scale**2
        elements = pixels * widths * self.first_stage_model.config.base_dim
        size = comfy.model_management.dtype_size(dtype)
        return 1.25 * elements * size + 2 * MAX_SCORE_BYTES

    def _tile_activations(self, shape, tile: int) -> float:
        """Bytes that one image of (..., h, w) latent cells takes in tiles, and a workspace."""
        size = comfy.model_management.dtype_size(self.vae_dtype)
        widths = 3.5 if self.device.type == "cuda" else 8
        config = self.first_stage_model.config
        return 1.25 * tiled_bytes(config, shape[-2:], tile, size, widths) + 2 * MAX_SCORE_BYTES

    def _cells(self, images) -> list[int]:
        """Rows and columns of the latents of images (..., H, W)."""
        return [side // self.downscale_ratio for side in images.shape[-2:]]

    def _load_for(self, memory, shape, convert):
        """Load for a conversion of so many bytes; it, or None where it takes tiles at once.

        Tiles give the same result. shape: (..., h, w) of the latents.
        """
        if memory > comfy.model_management.get_total_memory(self.device):
            self._load(self._tile_activations(shape, FALLBACK_TILES[0]))
            return None
        self._load(memory)
        return convert

    def _load(self, memory):
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory)

    def _with_fallback(self, source, convert, convert_tiled, finish):
        """Convert a batch one item at a time: in one piece, or in smaller and smaller tiles.

        convert: None where one piece is not to be tried.
        """
        # Images and latents alike by their sides in pixels.
        cell = self.downscale_ratio if finish == self._to_images else 1
        pixels = max(source.shape[-2:]) * cell
        attempts = [] if convert is None else [convert]
        for tile in FALLBACK_TILES:
            if tile < pixels:
                attempts.append(lambda item, tile=tile: convert_tiled(item, tile, tile // 8))
        results = []
        with comfy.model_management.cuda_device_context(self.device):
            for item in source.split(1):
                result = None
                while result is None:
                    result = self._attempt(attempts[0], item, last=len(attempts) == 1)
                    if result is None:
                        # The next item of the batch would run out of memory too.
                        del attempts[0]
                results.append(finish(result))
        return torch.cat(results)

    def _attempt(self, convert, item, last):
        """`convert(item)`, or None where memory ran out and smaller tiles remain.

        Raises ComfyUI's out-of-memory error where it was the last attempt.
        """
        if last:
            with advise("The VAE", _REMEDY):
                return convert(item.to(self.device))
        try:
            return convert(item.to(self.device))
        except Exception as error:
            comfy.model_management.raise_non_oom(error)
            logging.warning("The VAE ran out of memory; trying again in smaller tiles.")
        # Outside the handler, where the exception no longer holds on to tensors.
        comfy.model_management.soft_empty_cache()
        return None

    # ComfyUI's latents are unnormalised ones of the released VAE, by whose statistics its model
    # normalises them. A VAE of other statistics takes and returns normalised latents.

    def _decode_whole(self, latents):
        """ComfyUI's latents to images in [-1, 1]."""
        model = self.first_stage_model
        if self._has_released_statistics():
            return model.decode_unnormalised(latents)
        return model.decode(_normalise(latents))

    def _encode_whole(self, images):
        model = self.first_stage_model
        if self._has_released_statistics():
            return model.encode_unnormalised(images)
        return _denormalise(model.encode(images))

    def _decode_tiles(self, latents, tile, overlap):
        """overlap: of no use, since each tile is exact."""
        model = self.first_stage_model
        # The whole image may be larger than what the device has beside a tile.
        return model.decode_tiled(_normalise(latents), tile, _progress(), self.output_device)

    def _encode_tiles(self, images, tile, overlap):
        """overlap: as above."""
        model = self.first_stage_model
        return _denormalise(model.encode_tiled(images, tile, _progress()))

    def _has_released_statistics(self) -> bool:
        config = self.first_stage_model.config
        return (config.latents_mean, config.latents_std) == (
            VAEConfig.latents_mean,
            VAEConfig.latents_std,
        )

    def _tiling(self, tile_x, tile_y, overlap, scale):
        """Tile and overlap in pixels, whole cells, from core's two sides (the larger is taken)."""
        cell = self.downscale_ratio
        tile = max(tile_x or 0, tile_y or 0) * scale or FALLBACK_TILES[0]
        tile = max(cell, tile // cell * cell)
        overlap = tile // 8 if overlap is None else overlap * scale
        return tile, min(overlap // cell * cell, tile - cell)

    def _latents(self, samples):
        if samples.ndim == 5 and samples.shape[2] == 1:
            samples = samples[:, :, 0]
        if samples.ndim != 4 or samples.shape[1] != self.latent_channels:
            raise ValueError(
                f"The latent has shape {tuple(samples.shape)}; this VAE decodes single images of "
                f"{self.latent_channels} channels, (batch, {self.latent_channels}, 1, height / 8, "
                "width / 8). Use Krea 2 Size, or encode with the Krea 2 VAE."
            )
        return samples

    def _images(self, pixels):
        cell = self.downscale_ratio
        if pixels.ndim != 4 or min(pixels.shape[1:3]) < cell:
            raise ValueError(
                f"The image has shape {tuple(pixels.shape)}; expected (batch, height, width, "
                f"channels) of at least {cell} x {cell} pixels."
            )
        pixels = self.vae_encode_crop_pixels(pixels)
        return self.process_input(pixels.movedim(-1, 1))

    def _to_images(self, images):
        images = images.to(self.output_device, self.vae_output_dtype(), copy=True)
        return self.process_output(images).movedim(1, -1)

    def _to_latents(self, latents):
        return latents.to(self.output_device, self.vae_output_dtype()).unsqueeze(2)


def load_vae(
    path: str | Path | Checkpoint, dtype: torch.dtype | None = None, *, disable_dynamic=False
):
    """Load a Qwen-Image VAE file (original or diffusers names) or folder as a VAE.

    Raises CheckpointError that says what the file is and what was expected.
    """
    checkpoint = open_part(path, "vae")
    state = read_vae(checkpoint)
    if state.config.z_dim != VAEConfig.z_dim:
        raise CheckpointError(
            f"{checkpoint.path.name} is a VAE of {state.config.z_dim} latent channels; Krea 2 in "
            f"ComfyUI has {VAEConfig.z_dim}. Use {WHERE[VAE]}."
        )
    bare = QwenImageVAE(state.config, device="meta")
    check_weights(bare, state.tensors, checkpoint.path, VAE)
    vae = Krea2VAE(state, dtype, disable_dynamic=disable_dynamic)
    vae.patcher.cached_patcher_init = (_load_patcher, (path, dtype))
    return vae


def _load_patcher(path, dtype, disable_dynamic=False):
    return load_vae(path, dtype, disable_dynamic=disable_dynamic).patcher


def _statistics(device):
    """The released mean and standard deviation, (1, 16, 1, 1), as in ComfyUI's latent format."""
    values = (VAEConfig.latents_mean, VAEConfig.latents_std)
    return (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in values)


def _normalise(latents):
    mean, std = _statistics(latents.device)
    return (latents.float() - mean) / std


def _denormalise(latents):
    mean, std = _statistics(latents.device)
    return latents.float() * std + mean


def _progress():
    bar = None

    def report(step, total):
        nonlocal bar
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(step, total)

    return report
