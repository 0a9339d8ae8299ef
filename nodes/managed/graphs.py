"""The blocks of a run as one CUDA graph: recorded at its second step, replayed from the third on.

A replay launches all kernels of a step with one call. That pays where the host takes longer to
launch kernels than the GPU to run them: small images, 8-bit weights. Inputs are copied to the
graph's own; weights and rotary table must stay where they were recorded, so a graph is kept for one
run, and only where all weights stay on the device.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

# Key in a MODEL's transformer_options that allows recording its blocks.
CUDA_GRAPH = "krea2_cuda_graph"

# Of one run: positive, negative, and two regions more.
_MOST_GRAPHS = 4

Function = Callable[..., Tensor]


def record(function: Function, inputs: list[Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A recorded call of `function(*inputs)` to replay, and its output tensor."""
    torch.cuda.synchronize(inputs[0].device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*inputs)
    return graph.replay, out


class BlockGraphs:
    """The graphs of a run, by the sizes and conditions of a call."""

    def __init__(self, record=record):
        self._record = record
        self._seen: set = set()
        self._graphs: dict = {}
        self._has_failed = False

    def run(self, key: tuple, function: Function, *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, which depends on nothing else that changes between calls of a key.

        The function may overwrite its inputs.
        """
        if key in self._graphs:
            replay, static, out, _ = self._graphs[key]
            for place, value in zip(static, inputs, strict=True):
                place.copy_(value)
            replay()
            return out.clone()
        # The first call warms kernels up: they may allocate and select, which a graph must not.
        if key not in self._seen or self._has_failed or len(self._graphs) == _MOST_GRAPHS:
            self._seen.add(key)
            return function(*inputs)
        static = [value.clone() for value in inputs]
        try:
            replay, out = self._record(function, static)
        except RuntimeError as error:
            self._has_failed = True
            logging.warning(
                "Krea 2: the blocks could not be recorded as a CUDA graph (%s) and run without.",
                str(error).splitlines()[0],
            )
            return function(*inputs)
        # The function holds the other tensors of the recording.
        self._graphs[key] = replay, static, out, function
        # Recording does not run the function.
        return self.run(key, function, *inputs)
