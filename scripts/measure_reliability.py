"""Runs a server with krea2-nano through what should not break it, and writes down how it went.

    COMFYUI_PATH=ComfyUI python scripts/measure_reliability.py

Needs Linux, root for mounting a small disk, and ten minutes or so. The page it writes is
docs/reliability.md; with --only, nothing is written.
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
from pathlib import Path

from headless import ROOT, ComfyServer
from reliability import checks

PAGE = ROOT / "docs" / "reliability.md"
HEAD = """# Reliability

What a server with this pack was put through, and how it went. Written by

```bash
COMFYUI_PATH=ComfyUI python scripts/measure_reliability.py
```

which stops at the first thing that goes wrong. It starts a real headless ComfyUI with the built-in
krea2-nano, posts jobs to its API and injects faults. The quick ones are also tests
(`tests/comfy/test_reliability.py`), with a queue of 20 jobs. No weights of full size were run.
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
    parser.add_argument("--only", choices=names, nargs="+", help="these checks; writes nothing")
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
    }
    options = parse_arguments(list(sections))
    # Stopped from outside, the server has to be stopped too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    page = [HEAD]
    with tempfile.TemporaryDirectory(prefix="krea2-reliability-") as folder:
        checks.prepare(Path(folder))
        server = ComfyServer(
            os.environ["COMFYUI_PATH"], folder, packs=checks.PACKS, extra_args=["--cpu"]
        )
        with server:
            version = server.request("/system_stats")["system"]["comfyui_version"]
            for name in options.only or sections:
                title, measure = sections[name]
                print(f"{title} ...", flush=True)
                figures = measure(server)
                print(f"  {figures}", flush=True)
                page.append(f"## {title}\n\n{wrapped(figures)}\n")
    page.append(
        f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.system()}, ComfyUI {version} "
        "on the CPU.\n"
    )
    if not options.only:
        PAGE.write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
