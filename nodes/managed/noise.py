"""ComfyUI's NOISE: an object with a seed that draws the noise of a latent."""

import comfy.sample
import torch

from ...krea2_model.features.variations import slerp
from ...krea2_model.schedule import MAX_SEED


class NeighbourNoise:
    """Noise of one seed, moved towards that of another for each image of a batch.

    Image i moves towards variation_seed + i, whatever else is in the batch. base: NOISE whose first
    image is moved, in place of the seed's.
    """

    def __init__(self, seed: int, variation_seed: int, strength: float, base=None):
        self.seed = seed if base is None else base.seed
        self._variation_seed, self._strength, self._base = variation_seed, strength, base

    def generate_noise(self, latent):
        one = {"samples": latent["samples"][:1]}
        base = _noise(one, self.seed) if self._base is None else self._base.generate_noise(one)
        return torch.cat([
            slerp(base, _noise(one, self._variation_seed + number), self._strength)
            for number in _numbers(latent)
        ])  # fmt: skip


class WalkNoise:
    """Noise at a share of the way between two seeds; image i goes from seed + i to end_seed + i."""

    def __init__(self, seed: int, end_seed: int, share: float):
        self.seed = seed
        self._end_seed, self._share = end_seed, share

    def generate_noise(self, latent):
        one = {"samples": latent["samples"][:1]}
        return torch.cat([
            slerp(_noise(one, self.seed + n), _noise(one, self._end_seed + n), self._share)
            for n in _numbers(latent)
        ])  # fmt: skip


def noise_of(noise, start, latent):
    """The noise of a NOISE for the start (B, 16, 1, h, w) of a run. ValueError for another type."""
    found = noise.generate_noise({**latent, "samples": start})
    shape = tuple(getattr(found, "shape", ()))
    if not isinstance(found, torch.Tensor) or shape != tuple(start.shape):
        raise ValueError(
            f"noise has shape {shape}, and the latent {tuple(start.shape)}; expected the same. Use "
            "Krea 2 Vary or RandomNoise."
        )
    if not torch.isfinite(found).all():
        raise ValueError(
            "noise is NaN or infinite; expected numbers. Use Krea 2 Vary or RandomNoise."
        )
    return found.float()


def _noise(one, seed: int):
    return comfy.sample.prepare_noise(one["samples"], seed % (MAX_SEED + 1))


def _numbers(latent) -> list[int]:
    """The number of each image, by the latent's batch_index where it has one."""
    numbers = latent.get("batch_index")
    return list(map(int, range(len(latent["samples"])) if numbers is None else numbers))
