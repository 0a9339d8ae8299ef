"""Results that stay the same during a run: time embeddings, modulation, CUDA graphs.

Norm weights and modulation tables are small and many: ComfyUI takes longer to hand them out at each
step than a GPU to apply them.
"""

from weakref import WeakValueDictionary

import torch

from ...krea2_model.features.style_transfer import StyleRun
from ...krea2_model.transformer.modulation import RunModulation
from .graphs import BlockGraphs


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
        if None in rows:  # some samplers evaluate between two sigmas
            return embed(timestep)
        return tuple(part[rows] for part in self._table)


class RunCache:
    """Results that a run computes once, while weights do not change.

    times: time embeddings of the schedule, or None where each step computes its own.
    graphs: CUDA graphs of the blocks, or None without recording.
    style: the style pictures of the run, or None without any.
    """

    def __init__(self):
        self._read: tuple[torch.device, RunModulation] | None = None
        self.times: ScheduleTimes | None = None
        self.graphs: BlockGraphs | None = None
        self.style: StyleRun | None = None

    @torch.compiler.disable
    def modulation(self, transformer, device: torch.device) -> RunModulation:
        """The blocks' modulation, read at the first step."""
        if self._read is None or self._read[0] != device:
            self._read = device, RunModulation(transformer.blocks, device)
        return self._read[1]


# Freed with the last conditioning of the run.
_CACHES: WeakValueDictionary[tuple, RunCache] = WeakValueDictionary()


def run_cache(patcher) -> RunCache:
    """The cache of a run, shared by all its conditionings: of a model with its present patches."""
    key = (id(patcher.model.diffusion_model), patcher.patches_uuid)
    return _CACHES.setdefault(key, RunCache())
