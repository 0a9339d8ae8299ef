"""`krea2 render --engine comfyui`: rows of a table through a graph on running ComfyUI servers."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from krea2_model.checks import counted
from krea2_model.cli.errors import UsageError
from krea2_model.cli.jobs import check_name
from krea2_model.cli.progress import Console

from .comfy_graph import Template, read_graph
from .comfy_servers import JobError, Servers
from .ledger import Entry, Ledger, now
from .places import Place
from .plan import CHUNK, ID, JOB, Intake, Plan
from .render import finish, follow, keys_done, note_plan
from .tables import read_table
from .writing import FOLDER, not_written

_OUTPUT = "output"


def render(args: Namespace) -> Iterator[object]:
    """Make the pictures of a table; gives the place of the table of results.

    Raises Failure where pictures were not made, with the ledger that says why.
    """
    console, output = Console(args.quiet), Place(args.output)
    if args.workflow is None or not args.server:
        raise UsageError("--engine comfyui needs --workflow FILE and --server HOST:PORT.")
    if args.layout != FOLDER:
        raise UsageError(f"--layout {args.layout} goes with --engine ray; leave --layout out.")
    template = Template(read_graph(args.workflow))
    done = keys_done(args, output, console)
    plan = make_graph_plan(args.table, template, done)
    note_plan(plan, console)
    servers = Servers(args.server)
    if args.dry_run:
        yield (
            f"{counted(plan.rows, 'row')}: {counted(plan.jobs, 'picture')} to make, {plan.made} "
            f"made already, {plan.repeated} asked for twice, {counted(len(plan.errors), 'row')} "
            f"with errors; {counted(len(args.server), 'server')} there"
        )
        return
    output.check_writable()
    with Ledger(output) as ledger:
        ledger.add(plan.errors)
        failed = len(plan.errors)
        failed += follow(entries_of(plan, template, servers, output), plan, ledger, console)
        run = ledger.run
    yield from finish(output, run, failed, plan)


def make_graph_plan(address: str | Path, template: Template, done: np.ndarray) -> Plan:
    """The jobs of a table whose columns are inputs of a graph; see `plan.make_plan`."""
    plan = Plan()
    intake = Intake(plan, done)
    columns: set[str] = set()
    waiting: list[dict[str, Any]] = []
    for number, values in read_table(address, None):
        plan.rows += 1
        try:
            if isinstance(values, UsageError):
                raise values
            if new := {str(name) for name in values} - columns - {ID, _OUTPUT}:
                template.check_columns(new)
                columns |= new
            job = _job(number, values, template)
        except UsageError as error:
            plan.errors.append({"row": number, "error": str(error)})
            continue
        if intake.takes(job, number):
            waiting.append(job)
    intake.end(address)
    plan.chunks = [
        pa.Table.from_pylist(waiting[first : first + CHUNK], JOB)
        for first in range(0, len(waiting), CHUNK)
    ]
    return plan


def _job(number: int, values: dict[str, Any], template: Template) -> dict[str, Any]:
    row = dict(values)
    identity, output = row.pop(ID, None), row.pop(_OUTPUT, None)
    graph = template.fill(row)
    key = hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()[:16]
    file = f"{key[:2]}/{key}.png"
    if output is not None:
        check_name(Path(output))
        file = Path(output).as_posix()
    return {
        "row": number,
        "key": key,
        "id": None if identity is None else str(identity),
        "file": file,
        "prompt": str(row.get("prompt", "")),
        "seed": None,
        "values": json.dumps(row),
        "group": "",
    }


def entries_of(
    plan: Plan, template: Template, servers: Servers, output: Place
) -> Iterator[list[Entry]]:
    """Make the jobs of a plan on servers; gives their entries as they are written.

    As many jobs are under way as the servers take; where it is stopped, those that wait in a queue
    of theirs are taken back.
    """
    jobs = itertools.chain.from_iterable(chunk.to_pylist() for chunk in plan.chunks)
    with ThreadPoolExecutor(servers.slots) as pool:
        under_way: set[Future[Entry]] = set()
        try:
            while True:
                for job in itertools.islice(jobs, 2 * servers.slots - len(under_way)):
                    under_way.add(pool.submit(_paint, job, template, servers, output))
                if not under_way:
                    return
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                yield [future.result() for future in done]
        finally:
            servers.stopped.set()
            pool.shutdown(cancel_futures=True)


def _paint(job: dict[str, Any], template: Template, servers: Servers, output: Place) -> Entry:
    """Make a job and write its pictures; the entry names the first, and the others as `more`."""
    entry: Entry = {name: job[name] for name in ("row", "key", "id", "prompt") if job[name]}
    values = json.loads(job["values"])
    begin = time.monotonic()
    try:
        images, server = servers.paint(template.fill(values))
    except JobError as error:
        return {**entry, "error": str(error)}
    files = [job["file"]]
    files += [_numbered(job["file"], number) for number in range(2, len(images) + 1)]
    try:
        for file, data in zip(files, images, strict=True):
            output.write(file, data)
        with Image.open(io.BytesIO(images[0])) as image:
            width, height = image.size
    except Exception as error:
        return not_written(entry, error)
    seconds = round(time.monotonic() - begin, 3)
    entry |= {"settings": values, "server": server, "seconds": seconds, "time": now()}
    entry |= {"file": files[0], "sha256": hashlib.sha256(images[0]).hexdigest()}
    entry |= {"bytes": len(images[0]), "width": width, "height": height}
    return {**entry, "more": files[1:]} if files[1:] else entry


def _numbered(file: str, number: int) -> str:
    path = Path(file)
    return path.with_stem(f"{path.stem}-{number}").as_posix()
