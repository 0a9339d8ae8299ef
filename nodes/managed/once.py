"""Weights that a run reads only once: text fusion, time embeddings of its schedule, modulation.

Text fusion and time embedding are a tenth of the model. Where the weights do not fit the device
together, these are the ones to leave outside: read once a run and not at each step, they leave
their place to blocks. Norm weights and modulation tables are small and many: ComfyUI takes longer
to hand them out at each step than a GPU to apply them.
"""

from weakref import WeakValueDictionary

import torch

from ...krea2_model.transformer.modulation import RunModulation
from .graphs import BlockGraphs

_PARTS = ("txtfusion", "txtmlp", "tmlp", "tproj")


class ScheduleTimes:
    """Time embeddings of all sigmas of a run, made together at its first step."""

    def __init__(self):
        self._sigmas = None
        self._rows: dict[float, int] = {}
        self._table: tuple[torch.Tensor, ...] = ()

    @torch.compiler.disable
    def embed(self, embed, timestep, sigmas):
        """`embed(timestep)`; from the table for times that are among `sigmas`, or 0."""
        if sigmas is not self._sigmas:
            times = list(dict.fromkeys([*sigmas.float().tolist(), 0.0]))
            self._rows = {time: row for row, time in enumerate(times)}
            self._table = embed(torch.tensor(times, device=timestep.device))
            self._sigmas = sigmas
        rows = [self._rows.get(time) for time in timestep.tolist()]
        if None in rows:  # some samplers go to times in between
            return embed(timestep)
        return tuple(part[rows] for part in self._table)


class RunCache:
    """What is made once in a run in which weights stay as they are.

    times: time embeddings of the schedule, or None where each step makes its own.
    graphs: recordings of the blocks, or None where they are not to be recorded.
    """

    def __init__(self):
        self._read: tuple[torch.device, RunModulation] | None = None
        self.times: ScheduleTimes | None = None
        self.graphs: BlockGraphs | None = None

    @torch.compiler.disable
    def modulation(self, transformer, device: torch.device) -> RunModulation:
        """The blocks' modulation, read at the first step."""
        if self._read is None or self._read[0] != device:
            self._read = device, RunModulation(transformer.blocks, device)
        return self._read[1]


# Freed with the last conditioning of the run.
_CACHES: WeakValueDictionary[tuple, RunCache] = WeakValueDictionary()


def run_cache(patcher) -> RunCache:
    """One for all conditionings of a run: the model's, with the patches that it has now."""
    key = (id(patcher.model.diffusion_model), patcher.patches_uuid)
    return _CACHES.setdefault(key, RunCache())


class LoadsThemLast:
    """A patcher that takes these weights to the device after, and from it before, all others."""

    def _load_list(self, for_dynamic=False, **options):
        if for_dynamic:
            options["for_dynamic"] = True
        return _LoadList(super()._load_list(**options), for_dynamic)


class _LoadList(list):
    """Modules `(..., name, module, parameters)`, which ComfyUI sorts before it goes through them.

    It loads from the front, of a list in falling order (in rising order where dynamic VRAM gives
    priorities), and unloads from the front of one in rising order.
    """

    def __init__(self, entries, for_dynamic: bool):
        super().__init__(entries)
        self._for_dynamic = for_dynamic

    def sort(self, *, key=None, reverse=False):
        super().sort(key=key, reverse=reverse)
        last = reverse or self._for_dynamic
        super().sort(key=lambda entry: _read_once(entry[-3]) == last)


def _read_once(name: str) -> bool:
    return name.removeprefix("diffusion_model.").startswith(_PARTS)
