"""The jobs of a plan through Ray Data: painting by actors, encoding and writing by tasks.

Ray moves the blocks, holds back what the next stage cannot take yet, starts a killed worker anew
and gives its block to another. What is here chooses the sizes:

- A block is a task, and what a killed worker loses. So blocks are small.
- Actors do not take all cores: the tasks that feed them would never run.
- Ray's own checkpoints are not used: what is made is left out of the plan.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from krea2_model.cli.errors import Failure, UsageError

from .ledger import Entry
from .places import Place
from .plan import Plan
from .writing import FOLDER, FolderWriter, ShardWriter, encode

# Jobs of a block where a call takes fewer.
_BLOCK = 4
# Calls of a block where several jobs share one, so that few calls are cut short.
_CALLS = 4
# Times that a block is given to another worker after its own was killed. Its jobs are then tried
# once more, each by itself: one that kills every worker is an error, the others of its block none.
_RETRIES = 3
# Times that a worker is started anew. Where none of its starts succeeds, the run ends.
_RESTARTS = 100
_MOST_SHOWN = 300
_STARTS = 4
# Cores that Ray counts for tasks beside the actors; they share what the actors leave.
_TASK_CPUS = 0.1
# `ray start` asks for a token where ~/.ray/auth_token exists, but a program does not send one to an
# address that it is given unless told to.
_TOKEN = (
    ". If it is one that asks for a token, as `ray start` says, set RAY_AUTH_MODE=token here too"
)
_SETTINGS = {
    # Neither command nor pack reaches the network unasked.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
}


@dataclass(frozen=True)
class Resources:
    """What the workers of a run use.

    cpus, gpus: of a worker, as Ray counts them. threads: of torch on a CPU, None for its own.
    encoders: workers that encode prompts for the others, none where those do it themselves.
    encoder_gpus: of each.
    """

    workers: int
    gpus: float
    cpus: float
    threads: int | None = None
    encoders: int = 0
    encoder_gpus: float = 0.0


@contextmanager
def ray_session(address: str | None = None, quiet: bool = False, **options: Any) -> Iterator[None]:
    """A connection to a cluster, or a Ray of this machine's own while it lasts.

    options: of `ray.init`, for the latter. Raises UsageError where there is no cluster at the
    address, and Failure where Ray does not start.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    log = {"logging_level": logging.WARNING, "log_to_driver": not quiet}
    if address is not None:
        try:
            ray.init(address, **log)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"--address is {address}, where no Ray cluster answers ({_line(error)}). Start one "
                f"with: ray start --head{_TOKEN if 'RAY_AUTH_MODE' not in os.environ else ''}"
            ) from error
    else:
        _start_ray(**log, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(**options: Any) -> None:
    """Start Ray here, again where a busy machine takes longer than Ray waits for its parts."""
    import ray

    for left in reversed(range(_STARTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:  # of no class of its own
            ray.shutdown()
            if not left:
                raise Failure(
                    f"Ray does not start on this machine: {_line(error)} Its logs are in /tmp/ray."
                ) from error


def resources(args: Namespace, encoders: int = 0, encoder_gpus: float | None = None) -> Resources:
    """The workers that `args` ask for, or one a GPU of the cluster, or one for all cores.

    encoder_gpus: None is as for workers, up to one. Raises UsageError for more than there is.
    """
    import ray

    there = ray.cluster_resources()
    gpus, cpus = there.get("GPU", 0.0), there.get("CPU", 1.0)
    per_worker = args.gpus_per_worker
    if per_worker is None:
        per_worker = 1.0 if gpus and args.device in ("auto", "cuda") else 0.0
    each = min(per_worker, 1.0) if encoder_gpus is None else encoder_gpus
    if per_worker > 0:
        possible = int((gpus - encoders * each) / per_worker)
        workers = possible if args.workers is None else args.workers
        if not 0 < workers <= possible:
            asked = f"--workers {workers} with " if args.workers else ""
            others = f" beside --encoders {encoders}" if encoders else ""
            raise UsageError(
                f"{asked}--gpus-per-worker {per_worker:g}{others} is more than the {gpus:g} GPUs "
                f"of the cluster; expected at most {max(0, possible)} workers of this kind. Ask "
                "for less, or set --gpus-per-worker 0 to paint on CPUs."
            )
        share = min(1.0, _cpus(workers + encoders))
        return Resources(workers, per_worker, share, None, encoders, each)
    workers = 1 if args.workers is None else args.workers
    if workers > cpus:
        raise UsageError(
            f"--workers is {workers}, and the cluster has {cpus:g} cores; expected at most one a "
            "core."
        )
    threads = None if "OMP_NUM_THREADS" in os.environ else max(1, int(cpus) // workers)
    return Resources(workers, 0.0, _cpus(workers + encoders), threads, encoders, each)


def _cpus(workers: int) -> float:
    """Cores that Ray counts for a worker: one stays for cutting blocks, a share for the tasks.

    On each machine: the task that cuts blocks has to fit on one of them whole.
    """
    import ray

    machines = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    machines = [cores for cores in machines if cores > 0] or [1.0]
    at_most = math.ceil(workers / len(machines))
    return max(0.0, 0.8 * (min(machines) - 1.2)) / at_most


def _one_of(workers: Resources) -> Resources:
    """One worker of each kind, as a cluster has room for that has lost a machine."""
    encoders = min(workers.encoders, 1)
    cpus = min(workers.cpus, _cpus(1 + encoders))
    return replace(workers, workers=1, encoders=encoders, cpus=cpus)


class RayEncoder:
    """An actor: a loaded text encoder."""

    def __init__(self, args: Namespace, threads: int | None, folder: str):
        import torch

        from .encoding import JobEncoder

        _go_to(folder)
        if threads is not None:
            torch.set_num_threads(threads)
        self._encoder = JobEncoder(args)

    def __call__(self, block: pa.Table) -> pa.Table:
        return self._encoder(block)


class RayPainter:
    """An actor: a loaded model, and its counters for Ray's metrics."""

    def __init__(self, args: Namespace, batch: int, threads: int | None, folder: str):
        from ray.util import metrics

        from .painting import JobPainter

        _go_to(folder)
        self._painter = JobPainter(args, batch, threads)
        self._pictures = metrics.Counter("krea2_pictures", "Pictures painted")
        self._errors = metrics.Counter("krea2_errors", "Rows that ended in an error")
        self._seconds = metrics.Counter("krea2_painting_seconds", "Seconds spent painting")

    def __call__(self, block: pa.Table) -> pa.Table:
        painted = self._painter(block)
        for text in painted["entry"].to_pylist():
            entry = json.loads(text)
            if "error" in entry:
                self._errors.inc()
            else:
                self._pictures.inc()
                self._seconds.inc(max(entry["seconds"], 1e-6))
        return painted


def ray_entries(
    plan: Plan,
    args: Namespace,
    output: Place,
    workers: Resources,
    painter: type = RayPainter,
    encoder: type = RayEncoder,
) -> Iterator[list[Entry]]:
    """Make the jobs of a plan; gives their entries as they are written, in any order.

    painter, encoder: the classes of the actors. `plan.take` is to be called with the entries. Jobs
    whose workers were killed again and again have none. Raises Failure where no worker starts.
    """
    import ray
    from ray.data import DataContext
    from ray.exceptions import RayError

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # those of killed workers; see `_RETRIES`
    context.execution_options.preserve_order = False
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    references = []
    while plan.chunks:  # each is kept by Ray alone then
        references.append(ray.put(plan.chunks.pop(0)))
    size = _block_size(plan.jobs, args.batch, workers.workers)
    try:
        for again in (False, True):
            if again:
                # What went down with workers or a machine, each job by itself.
                references, size = _unended(plan, references), 1
                workers = _one_of(workers)
            jobs = ray.data.from_arrow_refs(references).repartition(target_num_rows_per_block=size)
            written = _pipeline(jobs, args, output, workers, painter, encoder)
            for entries in written.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield [json.loads(text) for text in entries["entry"].to_pylist()]
            if plan.ended.all():
                return
    except RayError as error:
        raise Failure(f"Ray ended the run: {_line(error)} What is made stays; add --resume.") from (
            error
        )


def _unended(plan: Plan, references: list[Any]) -> list[Any]:
    """Tables in Ray's store of the jobs that have no entry."""
    import ray

    tables = (plan.unended(ray.get(reference)) for reference in references)
    return [ray.put(table) for table in tables if table.num_rows]


def _pipeline(
    jobs: Any, args: Namespace, output: Place, workers: Resources, painter: type, encoder: type
) -> Any:
    """A data set of jobs (`plan.JOB`) as one of entries (`writing.ENTRIES`)."""
    from ray.data import ActorPoolStrategy

    tasks = {"num_cpus": _TASK_CPUS, "batch_format": "pyarrow", "zero_copy_batch": True}
    # Ray 2.60 to 2.63 have no other name for max_task_retries, of which they warn.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    if workers.encoders:
        jobs = jobs.map_batches(
            encoder,
            fn_constructor_args=(args, workers.threads, str(Path.cwd())),
            compute=ActorPoolStrategy(size=workers.encoders),
            num_cpus=workers.cpus,
            num_gpus=workers.encoder_gpus,
            batch_size=None,
            batch_format="pyarrow",
        )
    painted = jobs.map_batches(
        painter,
        fn_constructor_args=(args, args.batch, workers.threads, str(Path.cwd())),
        compute=ActorPoolStrategy(size=workers.workers, max_tasks_in_flight_per_actor=2),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        batch_size=None,
        batch_format="pyarrow",
        max_task_retries=_RETRIES,
        max_restarts=_RESTARTS,
    ).map_batches(encode, batch_size=None, **tasks)
    if args.layout == FOLDER:
        return painted.map_batches(FolderWriter(output).__call__, batch_size=None, **tasks)
    writer = ShardWriter(output, args.layout)
    return painted.map_batches(writer.__call__, batch_size=args.shard_size, **tasks)


def _go_to(folder: str) -> None:
    """Work in the folder of the command, from which relative paths are, where it is here too."""
    with suppress(OSError):
        os.chdir(folder)


def _block_size(jobs: int, batch: int, workers: int) -> int:
    """Jobs of a block: whole calls, and at least a few blocks for each worker."""
    most = _BLOCK if batch == 1 else batch * _CALLS
    fair = max(1, jobs // (4 * workers))
    return max(batch, min(most, fair) // batch * batch)


def _line(error: BaseException) -> str:
    """The last line of an error's text, which names what happened on a worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1] if lines else type(error).__name__
    return line if len(line) <= _MOST_SHOWN else f"{line[:_MOST_SHOWN]} ..."


def lost(jobs: Iterable[tuple[int, str]]) -> list[Entry]:
    """Entries for rows and keys of jobs that have none: their workers were killed on the way."""
    message = (
        f"Its worker was killed {2 * (_RETRIES + 1)} times. Memory may have run out: see Ray's "
        "log, and add --resume."
    )
    return [{"row": row, "key": key, "error": message} for row, key in jobs]
