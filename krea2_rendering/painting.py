"""A worker's part of the work: jobs to pixels, with a model that is loaded once."""

from __future__ import annotations

import itertools
import json
import os
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from krea2_model.cli.checks import check_machine
from krea2_model.cli.errors import explain
from krea2_model.cli.generate import texts_of
from krea2_model.cli.jobs import check_row, message_of
from krea2_model.cli.model_files import take_from_models
from krea2_model.cli.painter import Painter, Picture
from krea2_model.cli.progress import Console
from krea2_model.cli.settings import settings_of

from .encoding import embeddings_of
from .plan import RowOptions

# Rows of the same settings are checked once, up to so many settings.
_MAX_CHECKED = 4096

PAINTED = pa.schema(
    [
        # The entry of the ledger, as JSON, and the name of the file that it will have.
        ("entry", pa.string()),
        ("file", pa.string()),
        # Three bytes a pixel; empty where there is an error.
        ("pixels", pa.large_binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        # What the file keeps beside the pixels, as JSON.
        ("texts", pa.string()),
    ]
)


class JobPainter:
    """Paints blocks of jobs. Errors are entries; none of them ends the worker.

    batch: jobs of one group in a call of the model. A call with more than one always has so many,
    the last ones repeated, since pixels may depend on how many there are, and on nothing else of
    the others.
    """

    def __init__(self, args: Namespace, batch: int = 1, threads: int | None = None):
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self._args, self._batch = args, batch
        self._console = Console(quiet=True)
        self._options = RowOptions(args)
        self._checked = set[str]()
        take_from_models(args)
        self._painter = Painter(args, check_machine(args), self._console)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Jobs (`plan.JOB`) to pictures (`PAINTED`)."""
        rows: list[dict[str, Any]] = []
        for jobs in self._calls(block.to_pylist()):
            rows += self._paint(jobs)
        return pa.Table.from_pylist(rows, PAINTED)

    def _calls(self, jobs: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        if self._batch == 1:
            yield from ([job] for job in jobs)
            return
        for _, members in itertools.groupby(jobs, lambda job: job["group"]):
            group = list(members)
            for first in range(0, len(group), self._batch):
                yield group[first : first + self._batch]

    def _paint(self, jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The pictures of jobs that share a call, or their errors."""
        results, good, options = [], [], []
        for job in jobs:
            try:
                args = self._options.of_job(job)
                if len(self._checked) > _MAX_CHECKED:
                    self._checked.clear()
                check_row(args, self._checked)
            except Exception as error:
                results.append(self._failed(job, error))
            else:
                good.append(job)
                options.append(args)
        if not good:
            return results
        begin = time.monotonic()
        try:
            missing = self._batch - len(good)
            filled = options + [options[-1]] * missing
            embeddings = embeddings_of(good + [good[-1]] * missing)
            pictures = self._painter.paint_together(filled, "", embeddings=embeddings)
        except Exception as error:
            if len(good) > 1:
                # One of them may be to blame, or there was no room for all.
                return results + [row for job in good for row in self._paint_alone(job)]
            return [*results, self._failed(good[0], error)]
        seconds = round((time.monotonic() - begin) / len(good), 3)
        for job, args, picture in zip(good, options, pictures, strict=False):
            results.append(self._painted(job, args, picture, seconds))
        return results

    def _paint_alone(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        batch, self._batch = self._batch, 1
        try:
            return self._paint([job])
        finally:
            self._batch = batch

    def _painted(
        self, job: dict[str, Any], args: Namespace, picture: Picture, seconds: float
    ) -> dict[str, Any]:
        settings = settings_of(args, **picture.results)
        texts = texts_of(settings, self._console) if args.metadata else {}
        image = picture.image.convert("RGB")
        entry = {**_identity(job), "settings": settings, "seconds": seconds, "pid": os.getpid()}
        return {
            "entry": json.dumps(entry),
            "file": job["file"],
            "pixels": image.tobytes(),
            "width": image.width,
            "height": image.height,
            "texts": json.dumps(texts),
        }

    def _failed(self, job: dict[str, Any], error: Exception) -> dict[str, Any]:
        _give_up_device(error)
        entry = {**_identity(job), "error": message_of(error, self._args)}
        return {"entry": json.dumps(entry), "file": job["file"]}


def _identity(job: dict[str, Any]) -> dict[str, Any]:
    found = {name: job[name] for name in ("row", "key", "id", "seed", "prompt")}
    return {name: value for name, value in found.items() if value is not None}


def _give_up_device(error: Exception) -> None:
    """End the process after an error that leaves a device unusable: a new worker takes over."""
    explained = explain(error)
    if explained is not None and explained[0].startswith("The device failed"):
        os._exit(1)
