"""Weights that a run reads only once: text fusion, and the time embedding of a whole schedule.

They are a tenth of the model. Where the weights do not fit the device together, these are the ones
to leave outside: read once a run and not at each step, they leave their place to blocks.
"""

import torch

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
