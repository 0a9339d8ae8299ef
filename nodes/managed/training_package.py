"""The package krea2_training, imported when a node first trains."""

import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]


def training() -> Any:
    """krea2_training, with its modules as attributes.

    It imports krea2_model by its own name, which ComfyUI does not know: it imports the pack as a
    part of custom_nodes. So there are two copies of that code, which exchange nothing but tensors
    and settings. Raises ValueError where another version of them is installed and in use.
    """
    sys.path.insert(0, str(_ROOT))
    try:
        import krea2_model
        import krea2_training.engine.curve
        import krea2_training.train
    finally:
        sys.path.remove(str(_ROOT))
    for package in (krea2_model, krea2_training):
        if Path(str(package.__file__)).resolve().parents[1] != _ROOT:
            raise ValueError(
                f"Another {package.__name__} is in use, of another custom node or installed by "
                "pip. Remove it (pip uninstall krea2-kit) and restart ComfyUI."
            )
    return krea2_training
