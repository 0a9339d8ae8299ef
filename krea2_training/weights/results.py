"""The files of what was trained, with the metadata that readers look for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from krea2_model import Krea2Transformer, save_transformer
from krea2_model.checkpoints.transformer_keys import is_norm_or_table
from krea2_model.lora.edit_family import FAMILIES, family_header
from krea2_model.replacing import replacing

from ..config import RunConfig, TrainConfig
from ..data.cache import family_of
from ..engine.sharding import whole_tensor
from ..engine.world import ALONE, World
from ..samples import holding
from ..settings.sections import EDITS, FULL
from .adapters import AnyAdapter, adapters_of, file_tensors

# Of a file's metadata, what tells the family of an edit LoRA.
_FAMILY = {name for family in FAMILIES for name in family_header(family)}


class Result:
    """The file of what was trained, and those on the way.

    dataset: a hash of what was learned from, for the metadata. shipped: adapters of the file by
    their layers' names; None is all there are. extra: more metadata. usage: metadata of a start,
    which stands where the run says nothing else. world: its first process writes; all ask for it
    together, since weights may be sharded over them.
    """

    def __init__(
        self,
        model: Krea2Transformer,
        config: RunConfig,
        dataset: str,
        shipped: Mapping[str, AnyAdapter] | None = None,
        extra: Mapping[str, str] | None = None,
        world: World = ALONE,
        usage: Mapping[str, str] | None = None,
    ):
        self.usage = dict(usage or {})
        self.model, self.config, self.dataset, self.world = model, config, dataset, world
        self.shipped, self.extra = shipped, dict(extra or {})

    def write(self, step: int, values: dict[str, Tensor], path: Path) -> Path:
        """Write the file of a step, of the values of what is trained; returns its path."""
        is_full = self.config.adapter.method == FULL
        whole = self._whole(values) if is_full else {}
        with self.world.together():
            if self.world.is_first:
                path.parent.mkdir(parents=True, exist_ok=True)
                if is_full:
                    self._write_model(whole, path)
                else:
                    self._write_adapters(step, values, path)
        return path

    def _whole(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """A trained model's tensors as files have them, in the first process."""
        whole = {}
        for name, tensor in values.items():
            kept = whole_tensor(tensor)
            if self.world.is_first:
                kind = torch.float32 if is_norm_or_table(name) else torch.bfloat16
                whole[name] = kept.to("cpu", kind)
        return whole

    def _write_model(self, tensors: dict[str, Tensor], path: Path) -> None:
        own = self.model
        model = Krea2Transformer(own.config, device="meta", variant=own.variant, preset=own.preset)
        model.load_state_dict(tensors, assign=True)
        save_transformer(model, path)

    def _write_adapters(self, step: int, values: dict[str, Tensor], path: Path) -> None:
        with holding(self.model, values):
            shipped = adapters_of(self.model) if self.shipped is None else self.shipped
            tensors = file_tensors(shipped, self.config.output.key_style)
        # Vectors too are float32: a DoRA's lengths scale whole columns.
        tensors = {
            n: t.bfloat16() if min(t.shape, default=1) > 1 else t for n, t in tensors.items()
        }
        with replacing(path) as partial:
            save_file(tensors, partial, self.metadata(step))

    def write_step(self, step: int, values: dict[str, Tensor]) -> None:
        """The result so far, in the run's folder; the oldest beyond `keep` are removed."""
        output = self.config.output
        if not output.keep or step >= self.config.training.steps:
            return
        folder = output.run_folder
        assert output.path is not None
        self.write(step, values, folder / f"{output.path.stem}_step{step:06}.safetensors")
        if self.world.is_first:
            files = sorted(folder.glob(f"{output.path.stem}_step*.safetensors"))
            for old in files[: -output.keep]:
                old.unlink()

    def metadata(self, step: int) -> dict[str, str]:
        """What trainers write, in the names that readers look for."""
        config = self.config
        adapter = config.adapter
        table = {
            k: v for k, v in config.as_table().items() if k not in ("memory", "samples", "ranks")
        }
        metadata = {
            "format": "pt",
            "modelspec.architecture": f"krea2/{adapter.method}",
            "ss_base_model_version": "krea2",
            "ss_network_dim": str(adapter.rank),
            "ss_network_alpha": str(adapter.rank if adapter.alpha is None else adapter.alpha),
            "ss_output_name": config.output.path.stem if config.output.path else "",
            "ss_steps": str(step),
            "krea2.dataset": self.dataset,
            "krea2.training": json.dumps(_without_folders(table)),
        }
        own = self.extra
        if isinstance(config, TrainConfig):
            own = _data_metadata(config) | own
        usage = self.usage
        if own.keys() & _FAMILY:
            usage = {name: text for name, text in usage.items() if name not in _FAMILY}
        return metadata | usage | own


def _without_folders(table: Any) -> Any:
    """Settings without the folders of this machine, which are nobody's business."""
    if isinstance(table, dict):
        return {name: _without_folders(value) for name, value in table.items()}
    if isinstance(table, list):
        return [_without_folders(value) for value in table]
    if isinstance(table, str) and ("/" in table or "\\" in table):
        return Path(table).name.partition("?")[0]  # an address may end in a password
    return table


def _data_metadata(config: TrainConfig) -> dict[str, str]:
    data, metadata = config.data, {}
    if data.trigger:
        metadata["modelspec.trigger_phrase"] = data.trigger
    if data.references != EDITS[0]:
        metadata |= family_header(family_of(data.references))
    return metadata
