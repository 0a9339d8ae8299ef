"""The order in which ComfyUI loads our weights: those read once a run last, and first to leave.

Text fusion and time embedding are a tenth of the model. Where the weights do not fit the device
together, these are the ones to offload: they are read once a run and not at each step, and leave
their place to blocks.
"""

_PARTS = ("txtfusion", "txtmlp", "tmlp", "tproj")


class LoadRunConstantsLast:
    """A patcher that loads these weights after, and offloads them before, all others."""

    def _load_list(self, for_dynamic=False, **options):
        if for_dynamic:
            options["for_dynamic"] = True
        entries = super()._load_list(**options)  # type: ignore[misc] # of the patcher beside it
        return _LoadList(entries, for_dynamic)


class _LoadList(list):
    """Modules `(..., name, module, parameters)`, which ComfyUI sorts before it goes through them.

    It loads from the front of a list sorted in descending order (ascending with dynamic VRAM), and
    unloads from the front of one in ascending order. Other columns of an entry are its memory, by
    which ComfyUI also calculates, so they cannot hold another key. Entries of an unknown form keep
    ComfyUI's order.
    """

    def __init__(self, entries, for_dynamic: bool):
        super().__init__(entries)
        self._for_dynamic = for_dynamic

    def sort(self, *, key=None, reverse=False):
        super().sort(key=key, reverse=reverse)
        last = reverse or self._for_dynamic
        if all(len(entry) > 2 and isinstance(entry[-3], str) for entry in self):
            super().sort(key=lambda entry: _is_run_constant(entry[-3]) == last)


def _is_run_constant(name: str) -> bool:
    return name.removeprefix("diffusion_model.").startswith(_PARTS)
