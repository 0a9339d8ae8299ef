"""Run the check: sections in processes of their own, before a deadline, whatever one of them does.

    python -P -m benchmarks.gpu [--tiny] [--only SECTION ...] [--out DIR]

PYTHONPATH has ComfyUI first and the repository last; scripts/gpu_check.sh sets it. A process that
dies or hangs costs the section it was in, which is recorded with the end of its output; the
sections after it go on in a fresh one.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .report import write_report
from .results import FAILED, RUNNING, SKIPPED, Results
from .sections import BY_NAME, DEADLINE_S, LEAST_S, RESERVED_S, SECTIONS, Section, processes

HERE = Path(__file__).resolve().parent
# Beyond its own limit a section has this long to notice; a process has this long to begin one.
GRACE_S, START_S = 15, 90


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU: tries the code")
    parser.add_argument("--only", nargs="+", choices=BY_NAME, metavar="SECTION",
                        default=[section.name for section in SECTIONS],
                        help=f"of {', '.join(BY_NAME)}")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or HERE),
                        help="folder of results.json and GPU.md")  # fmt: skip
    parser.add_argument("--seconds", type=int, default=DEADLINE_S, help="the deadline")
    return parser.parse_args(arguments)


class Runner:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.ends = time.time() + options.seconds
        self.out = options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        if len(options.only) == len(SECTIONS):
            (self.out / "results.json").unlink(missing_ok=True)

    def run(self) -> Results:
        results = Results(self.out)
        run = results.content["run"]
        if run.get("tiny", self.options.tiny) != self.options.tiny:
            results.content["sections"] = {}
        run |= {"date": datetime.date.today().isoformat(), "tiny": self.options.tiny}
        results.write()
        groups = processes(self.options.only, self.options.tiny)
        for index, sections in enumerate(groups):
            reserved = sum(RESERVED_S.get(later[0].process, 0) for later in groups[index + 1 :])
            self.run_process(sections, self.ends - reserved)
            self.report()
        return self.report()

    def report(self) -> Results:
        results = Results(self.out)
        write_report(results.content, self.out / "GPU.md")
        return results

    def run_process(self, sections: list[Section], ends: float) -> None:
        """Run sections that share a process, starting it anew after one that ended it."""
        left = list(sections)
        while left:
            if ends - time.time() < LEAST_S:
                results = Results(self.out)
                for section in left:
                    results.end(section.name, SKIPPED, error="no time was left")
                return
            output = self.worker(left, ends)
            results = Results(self.out)
            ended = [section for section in left if results.state(section.name) == RUNNING]
            for section in ended:
                results.end(section.name, FAILED, error=f"the process ended:\n{output}")
            unseen = [s for s in left if results.state(s.name) is None]
            if unseen == left:
                # It did not even start, and would not the next time.
                for section in left:
                    results.end(section.name, FAILED, error=f"no process started:\n{output}")
                return
            left = unseen

    def worker(self, sections: list[Section], ends: float) -> str:
        """One process; the end of its output. Killed where it outstays what it was given."""
        for section in sections:
            self.forget(section.name)
        command = self.command([section.name for section in sections], ends)
        log = self.out / "worker.log"
        with log.open("ab") as file:
            start = file.tell()
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                       start_new_session=True)  # fmt: skip
            try:
                self.watch(process, ends)
            finally:
                if process.poll() is None:
                    # With the processes that it started itself.
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return log.read_bytes()[start:].decode(errors="replace")[-1500:]

    def command(self, names: list[str], ends: float) -> list[str]:
        """Of a process that runs these sections; -P and -S as this one has them."""
        flags = ["-P"] * sys.flags.safe_path + ["-S"] * sys.flags.no_site
        tiny = ["--tiny"] if self.options.tiny else []
        return [sys.executable, *flags, "-m", "benchmarks.gpu.worker", "--ends", str(ends),
                "--out", str(self.out), "--sections", *names, *tiny]  # fmt: skip

    def watch(self, process: subprocess.Popen, ends: float) -> None:
        seen, since = None, time.time()
        while process.poll() is None and time.time() < ends + GRACE_S:
            sections = Results(self.out).content["sections"]
            running = next((n for n in sections if sections[n]["state"] == RUNNING), None)
            if running != seen:
                seen, since = running, time.time()
                print(f"{time.time() - self.ends + self.options.seconds:4.0f} s  {seen or '...'}",
                      flush=True)  # fmt: skip
            limit = BY_NAME[seen].seconds if seen else START_S
            if time.time() - since > limit + GRACE_S:
                return
            time.sleep(0.2)

    def forget(self, name: str) -> None:
        results = Results(self.out)
        if results.content["sections"].pop(name, None) is not None:
            results.write()


def main() -> None:
    options = parse()
    # So that a process of ours does not outlive us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    results = Runner(options).run()
    states = {name: section["state"] for name, section in results.content["sections"].items()}
    print("\n".join(f"{state:8} {name}" for name, state in states.items()))
    print((results.path.parent / "GPU.md").read_text())
    rows = [row for section in results.content["sections"].values() for row in section["rows"]]
    failed = FAILED in states.values() or any(row.get("passed") is False for row in rows)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
