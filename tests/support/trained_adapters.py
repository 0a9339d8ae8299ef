"""A model whose adapters are something, as after training, without training it."""

from __future__ import annotations

import torch

from krea2_model import Krea2Transformer
from krea2_training.settings.sections import Adapter
from krea2_training.weights.adapters import adapters_of, add_adapters


def trained(model: Krea2Transformer, settings: Adapter) -> Krea2Transformer:
    """Add adapters to a model and fill them with noise of a trained adapter's size."""
    add_adapters(model, settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            for name, parameter in adapter.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                if name == "magnitude":
                    parameter.mul_(1 + 0.1 * noise)
                else:
                    parameter.add_(0.2 * noise * parameter.shape[-1] ** -0.5)
    return model
