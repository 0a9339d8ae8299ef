"""A process of torchrun's that does the runs of a file of JSON, one after the other.

Each has a command, its settings, and perhaps dies_at: a step after which the last process kills
itself, once; or stops_at: one after which it asks for the end. The bytes that a process sends in
its second step are written beside the result.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from krea2_training.commands import run_command
from krea2_training.config import KINDS, read_config
from krea2_training.engine.world import StopTraining


def main() -> None:
    torch.set_num_threads(1)
    rank, is_first_start = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    is_last = rank == int(os.environ["WORLD_SIZE"]) - 1
    sent = count_bytes()
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        before = []

        def on_step(step, record, run=run, before=before):
            before.append(sent[0])
            if is_last and is_first_start and step == run.get("dies_at"):
                os.kill(os.getpid(), signal.SIGKILL)
            # One process alone asks for the end; all of them come to it.
            if is_last and step == run.get("stops_at"):
                raise StopTraining

        config = read_config(None, run["settings"], KINDS[run["command"]])
        output = Path(run["settings"]["output.path"])
        try:
            run_command(config, on_step)
            if rank == 0:
                output.with_suffix(".bytes").write_text(str(before[1] - before[0]), "utf-8")
        except ValueError as error:
            output.with_suffix(f".{rank}.txt").write_text(str(error), encoding="utf-8")


def count_bytes() -> list[int]:
    """A list whose number grows by what the collective operations of this process send."""
    sent = [0]

    def counted(name: str, place: int, word: str, times: int) -> None:
        operation = getattr(dist, name)

        def call(*values, **named):
            tensor = named.get(word, values[place] if len(values) > place else None)
            count = dist.get_world_size(named.get("group"))
            sent[0] += times * tensor.nbytes * (count - 1) // count
            return operation(*values, **named)

        setattr(dist, name, call)

    counted("all_gather_into_tensor", 0, "output_tensor", 1)
    counted("reduce_scatter_tensor", 1, "input", 1)
    counted("all_reduce", 0, "tensor", 2)
    return sent


if __name__ == "__main__":
    main()
