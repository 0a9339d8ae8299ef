"""`krea2 render` by other engines than the plain one and `krea2 serve`, in `krea2_rendering`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .curate_options import ENGINES as CURATE_ENGINES
from .errors import Failure, UsageError, goes_with
from .render_options import ENGINE_OPTIONS

Each = Callable[..., Iterator[Any]]

REQUIREMENTS = ("ray", "pyarrow", "fsspec", "starlette")
_INSTALL = (
    'pip install "ray[data,serve]" pyarrow fsspec python-multipart, or in the pack\'s folder '
    "pip install -r requirements-rendering.txt"
)


def render(args: Namespace) -> Iterator[object]:
    """Make the pictures of a table with the engine that `args` name."""
    try:
        if args.engine == "comfyui":
            from krea2_rendering.comfy_engine import render as run
        else:
            from krea2_rendering.render import render as run
        yield from run(args)
    except ImportError as error:
        raise missing(error) from error


def serve(args: Namespace) -> Iterator[object]:
    """Serve pictures over HTTP until it is stopped; gives the address."""
    args.prompt, args.seeds = "", None
    try:
        from krea2_rendering.serving import run

        yield from run(args)
    except ImportError as error:
        raise missing(error) from error


@contextmanager
def reading(args: Namespace, each: Each) -> Iterator[Each]:
    """The function that reads the files of `krea2 curate`: the plain one, or tasks of a Ray."""
    if args.engine == CURATE_ENGINES[0]:
        if args.address is not None:
            raise goes_with("--address", "--engine ray")
        yield each
        return
    try:
        from krea2_rendering.ray_each import ray_each
        from krea2_rendering.ray_engine import ray_session

        with ray_session(args.address, quiet=True, include_dashboard=False):
            yield ray_each
    except ImportError as error:
        raise missing(error) from error


def missing(error: ImportError) -> Exception:
    """The error for a package that is not installed, with the line that installs it."""
    name = (error.name or "").partition(".")[0]
    if name not in REQUIREMENTS:
        return error
    return Failure(f"The Python package {name} is missing: {_INSTALL}")


def check_plain(args: Namespace) -> None:
    """Refuse options of other engines with the plain one."""
    for name, default in ENGINE_OPTIONS.items():
        if getattr(args, name) != default:
            option = f"--{name.replace('_', '-')}"
            engine = "comfyui" if name in ("server", "workflow") else "ray"
            raise goes_with(option, f"--engine {engine}")
    for option, place in (("FILE", args.table), ("--output", args.output)):
        if isinstance(place, str):
            raise UsageError(f"{option} is {place}; addresses go with --engine ray.")
