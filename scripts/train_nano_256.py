"""Train krea2-nano at 256 px, scenes and landscapes: every stage, its files and exams in one run.

    python scripts/train_nano_256.py --minutes 8 --output .local/nano256     # on a GPU
    python scripts/train_nano_256.py --toy                  # every stage at toy scale, on a CPU
    python scripts/train_nano_256.py --install .local/nano256

A run ends after its minutes, with the VAE, Raw, Turbo, both LoRAs and the preview in the output
folder, report.json (times, losses, exams) and sheets.png. A run that was stopped goes on where its
states in `--folder` end. Nothing that ships changes before `--install` copies the six files into
krea2_model/nano.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="of the run (default: 8); --toy needs about two"
    )
    parser.add_argument("--output", type=Path, default=ROOT / ".local" / "nano256")
    parser.add_argument("--folder", type=Path, help="of states (default: beside the output)")
    parser.add_argument("--workers", type=int, help="that draw (default: all cores but one)")
    parser.add_argument("--toy", action="store_true", help="every stage at toy scale")
    parser.add_argument("--install", type=Path, metavar="OUTPUT", help="copy files, train nothing")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # Workers import this file as well, and are to start without torch.
    from nano_training.recipe.plan import TOY, Plan
    from nano_training.recipe.run import RecipeRun, install

    if options.install:
        for place in install(options.install):
            print(place)
        return
    plan = TOY if options.toy else Plan()
    workers = (os.cpu_count() or 2) - 1 if options.workers is None else options.workers
    folder = options.folder or options.output.with_name(f"{options.output.name}_states")
    run = RecipeRun(options.output, folder, plan, 60 * options.minutes, workers)
    run.run()
    if run.failed:
        sys.exit(f"Failed: {', '.join(run.failed)}. The log above and report.json say why.")


if __name__ == "__main__":
    main()
