"""What a run will take: rows, calls of the model, bytes and hours; nothing is kept."""

from __future__ import annotations

import time
from argparse import Namespace
from collections import Counter

from krea2_model.checks import counted
from krea2_model.cli.progress import Console

from .painting import JobPainter
from .places import Place, check_room
from .plan import Plan
from .writing import encode

# Settings that are tried: those of most jobs. Others are taken to be like them.
_TRIED = 3
_SHOWN = 5


def forecast(plan: Plan, args: Namespace, output: Place, console: Console) -> str:
    """Text for a person. One call a size is made on this machine, after one to warm up."""
    lines = [
        f"{counted(plan.rows, 'row')}: {counted(plan.jobs, 'picture')} to make, {plan.made} made "
        f"already, {plan.repeated} asked for twice, {counted(len(plan.errors), 'row')} with errors"
    ]
    lines += [f"  row {e['row']}: {e['error']}" for e in plan.errors[:5]]
    if not plan.jobs:
        return "\n".join(lines)
    for (width, height, steps), count in plan.sizes.most_common(_SHOWN):
        size = "the checkpoint's size" if width is None else f"{width} x {height} px"
        taken = "default steps" if steps is None else counted(steps, "step")
        lines.append(f"  {count} of {size}, {taken}")
    calls = sum(-(-count // args.batch) for count in plan.groups.values())
    if args.batch == 1:
        calls = plan.jobs
    lines.append(f"{counted(calls, 'call')} of the model, {plan.jobs / calls:.1f} pictures each")
    seconds, bytes_each = _measure(plan, args, console)
    workers = args.workers or 1
    hours = plan.jobs * seconds / workers / 3600
    total = plan.jobs * bytes_each
    lines.append(
        f"{seconds:.2f} s a picture on this machine: {hours:.2f} hours with "
        f"{counted(workers, 'worker')} like it"
    )
    lines.append(f"{bytes_each / 1000:.0f} kB a picture: {total / 1e9:.3f} GB in {output}")
    if note := check_room(output, int(total)):
        lines.append(note)
    return "\n".join(lines)


def _measure(plan: Plan, args: Namespace, console: Console) -> tuple[float, float]:
    """Seconds and bytes a picture, for the settings of the first chunk, by their jobs."""
    chunk = plan.chunks[0]
    values = chunk["values"].to_pylist()
    seconds = size = weight = 0.0
    with console.stage("trying one call of each size"):
        painter = JobPainter(args, args.batch)
        for value, count in Counter(values).most_common(_TRIED):
            block = chunk.slice(values.index(value), 1)
            painter(block)  # compiles, allocates
            begin = time.perf_counter()
            data = [d for d in encode(painter(block))["data"].to_pylist() if d is not None]
            each = (time.perf_counter() - begin) / args.batch
            if data:
                seconds += count * each
                size += count * len(data[0])
                weight += count
    return (seconds / weight, size / weight) if weight else (0.0, 0.0)
