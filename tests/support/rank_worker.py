"""A process of torchrun's that does the runs of a file of JSON, one after the other.

Each has a command, its settings, and perhaps dies_at: a step after which the last process kills
itself, once.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from krea2_training.commands import run_command
from krea2_training.config import KINDS, read_config
from krea2_training.world import StopTraining


def main() -> None:
    torch.set_num_threads(1)
    rank, is_first_start = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    is_last = rank == int(os.environ["WORLD_SIZE"]) - 1
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):

        def on_step(step, record, run=run):
            if is_last and is_first_start and step == run.get("dies_at"):
                os.kill(os.getpid(), signal.SIGKILL)
            # One process alone asks for the end; all of them come to it.
            if is_last and step == run.get("stops_at"):
                raise StopTraining

        config = read_config(None, run["settings"], KINDS[run["command"]])
        try:
            run_command(config, on_step)
        except ValueError as error:
            (Path(run["settings"]["output.path"]).with_suffix(f".{rank}.txt")).write_text(
                str(error), encoding="utf-8"
            )


if __name__ == "__main__":
    main()
