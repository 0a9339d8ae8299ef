"""Runs a server with krea2-nano through what should not break it, and writes down how it went.

    COMFYUI_PATH=ComfyUI python scripts/measure_reliability.py

Needs Linux, root for mounting a small disk, and ten minutes or so. The page it writes is
docs/reliability.md; with --only, nothing is written, or with --update those sections of it.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import signal
import sys
import tempfile
import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from headless import ROOT, ComfyServer
from reliability import checks, fuzz

FILES = "files"  # needs no server
PAGE = ROOT / "docs" / "reliability.md"
HEAD = """# Reliability

What a server with this pack was put through, and how it went. Written by

```bash
COMFYUI_PATH=ComfyUI python scripts/measure_reliability.py
```

which stops at the first thing that goes wrong. It starts a real headless ComfyUI with the built-in
krea2-nano, posts jobs to its API and injects faults. The quick ones are also tests
(`tests/comfy/test_reliability.py`, `tests/unit/test_fuzz.py`), with a queue of 20 jobs. No weights
of full size were run.
"""


def wrapped(text: str) -> str:
    """Lines of at most 100 columns; those of a list are set in."""
    lines = []
    for line in text.splitlines():
        indent = "  " if line.startswith("- ") else ""
        lines.append(textwrap.fill(line, 100, subsequent_indent=indent, break_on_hyphens=False))
    # A list begins after an empty line.
    return "\n".join(lines).replace("\n- ", "\n\n- ", 1)


def parse_arguments(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=500, help="in the long queue (default: 500)")
    parser.add_argument(
        "--files", type=int, default=2000, help="files of each kind to make up (default: 2000)"
    )
    parser.add_argument("--only", choices=names, nargs="+", help="these checks; writes nothing")
    parser.add_argument(
        "--update", action="store_true", help="with --only, put their sections into the page"
    )
    options = parser.parse_args()
    if not os.environ.get("COMFYUI_PATH"):
        parser.error("COMFYUI_PATH is not set; expected ComfyUI's folder")
    return options


def main() -> None:
    sections: dict[str, tuple[str, Callable]] = {
        "queue": ("A long queue", lambda server: checks.queue(server, options.jobs)),
        "clients": ("Eight clients at once", lambda server: checks.clients(server, 8, 5)),
        "kill": ("Killed and started again", checks.kill),
        "disk": ("A full disk", checks.full_disk),
        "replaced": ("A model file replaced between runs", checks.replaced_files),
        "read-only": ("A models folder that cannot be written", checks.read_only_models),
        "memory": ("Out of memory", checks.out_of_memory),
        FILES: ("Files of any content", lambda server: fuzz.figures(options.files)),
    }
    options = parse_arguments(list(sections))
    # Stopped from outside, the server has to be stopped too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    chosen = options.only or list(sections)
    found: dict[str, str] = {}
    version = ""
    with ExitStack() as stack:
        server = None
        if set(chosen) != {FILES}:
            server = stack.enter_context(started_server(stack))
            version = server.request("/system_stats")["system"]["comfyui_version"]
        for name in chosen:
            title, measure = sections[name]
            print(f"{title} ...", flush=True)
            figures = measure(server)
            print(f"  {figures}", flush=True)
            found[title] = f"## {title}\n\n{wrapped(figures)}\n"
    if not options.only:
        machine = f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.system()}"
        foot = f"{machine}, ComfyUI {version} on the CPU.\n"
        PAGE.write_text("\n".join((HEAD, *found.values(), foot)), encoding="utf-8")
    elif options.update:
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


def started_server(stack: ExitStack) -> ComfyServer:
    """A server on a folder of its own, which goes with `stack`; entering it starts it."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="krea2-reliability-"))
    checks.prepare(Path(folder))
    comfyui = os.environ["COMFYUI_PATH"]
    return ComfyServer(comfyui, folder, packs=checks.PACKS, extra_args=["--cpu"])


def updated(page: str, sections: dict[str, str]) -> str:
    """A page with some sections made anew, by title; new ones come last, before the foot."""
    page, _, foot = page.rstrip().rpartition("\n\n")
    head, *old = (page + "\n").split("\n## ")
    parts = {text.partition("\n")[0]: f"## {text}" for text in old} | sections
    return "\n".join((head, *parts.values(), f"{foot}\n"))


if __name__ == "__main__":
    main()
