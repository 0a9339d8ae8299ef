"""Fits the colours of krea2-nano's live preview: linear maps from its latents to pictures.

    python scripts/fit_nano_preview.py

Its VAE was trained for its own flat scenes, so the factors that ComfyUI has for the released VAE
show other colours. Least squares over training scenes, against the mean of the 8 x 8 pixels that a
latent cell covers: from the cell alone, and from the cell and its eight neighbours. Writes
`krea2_nano_preview.safetensors` into `krea2_model/nano` and prints the errors on other scenes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from krea2_model import nano  # noqa: E402
from krea2_model.checkpoints.vae import load_vae  # noqa: E402
from krea2_model.nano.preview import FILE  # noqa: E402
from nano_training.scenes import PICTURE_SIZES, draw, random_scene  # noqa: E402

SCENES = 400
NOTEBOOK = 0.2  # the share in the style of the LoRA


def cells_and_colours(side: int, count: int = SCENES, seed: int = 0):
    """Squares of latent cells (N, 16 side side), and the mean colour (N, 3) of their middle.

    Latents are normalised, colours in [-1, 1], as ComfyUI's previews have them.
    """
    random, vae = Random(seed), load_vae(nano.VAE)
    cells, colours = [], []
    for _ in range(count):
        size, notebook = random.choice(list(PICTURE_SIZES)), random.random() < NOTEBOOK
        picture = torch.from_numpy(draw(random_scene(random), *size, random, notebook))
        picture = picture.movedim(-1, 0)[None] * 2 - 1
        with torch.no_grad():
            latents = vae.encode(picture)
        around = F.pad(latents, [side // 2] * 4, mode="replicate")
        cells.append(F.unfold(around, side)[0].T)
        colours.append(F.avg_pool2d(picture, vae.config.downscale)[0].flatten(1).T)
    return torch.cat(cells), torch.cat(colours)


def with_one(cells: torch.Tensor) -> torch.Tensor:
    return F.pad(cells, (0, 1), value=1.0).double()


def main() -> None:
    tensors = {}
    for name, side in (("cell", 1), ("neighbours", 3)):
        cells, colours = cells_and_colours(side)
        solution = torch.linalg.lstsq(with_one(cells), colours.double()).solution
        cells, colours = cells_and_colours(side, count=100, seed=1)
        error = ((with_one(cells) @ solution).clamp(-1, 1) - colours).abs().mean() * 127.5
        print(f"{name}: mean error {error:.1f} of 255 on other scenes")
        weight = solution[:-1].T.reshape(3, 16, side, side)
        tensors |= {f"{name}.weight": weight.float(), f"{name}.bias": solution[-1].float()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, FILE, {"format": "pt"})


if __name__ == "__main__":
    main()
