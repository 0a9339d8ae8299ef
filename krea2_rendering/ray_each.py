"""A function of many files on the cores of a Ray cluster, which reads them from a shared folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from krea2_model.cli.errors import Failure
from krea2_training.curate.workers import AHEAD, ahead_of, all_of

Result = TypeVar("Result")

# Times that a task is given to another process after its own was killed.
_RETRIES = 3


def ray_each(
    function: Callable[[Path], Result], files: Sequence[Path], workers: int | None = None
) -> Iterator[Result]:
    """The function's results, in the order of the files.

    workers: tasks at a time; None is one for each core of the cluster. Raises Failure where Ray
    gives a task up.
    """
    import ray
    from ray.exceptions import RayError

    task = ray.remote(max_retries=_RETRIES)(all_of)
    files = [path.absolute() for path in files]
    most = workers or AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    try:
        for reference in ahead_of(lambda part: task.remote(function, part), files, most):
            yield from ray.get(reference)
    except RayError as error:
        line = str(error).strip().splitlines()[-1]
        raise Failure(
            f"Ray ended the work: {line} What was read is kept: give the command again."
        ) from error
