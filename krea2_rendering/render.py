"""`krea2 render` with an engine of many workers: checks, the plan, the run, the ledger."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from krea2_model.checkpoints.text_encoder import find_tokenizer
from krea2_model.checks import counted
from krea2_model.cli.checks import check_machine
from krea2_model.cli.errors import Failure, UsageError
from krea2_model.cli.model_files import Weights, take_from_models
from krea2_model.cli.progress import Console
from krea2_model.text.prompt_tokens import tokenize_prompt
from krea2_model.text.tokenizer import Krea2Tokenizer

from .ledger import TABLE, Entry, Ledger, finished, read_entries, write_table
from .places import Place
from .plan import Plan, TokensOf, make_plan
from .ray_engine import lost, ray_entries, ray_session, resources
from .writing import FOLDER, STOP, records_of, shard_names


def render(args: Namespace) -> Iterator[object]:
    """Make the pictures of a table; gives the place of the table of results.

    Raises Failure where pictures were not made, with the ledger that says why.
    """
    import ray  # noqa: F401 - a missing one is said before the table is read

    console, output = Console(args.quiet), Place(args.output)
    take_from_models(args)
    weights = check_machine(args)
    _check_options(args)
    if not args.dry_run:
        output.check_writable()
    done = keys_done(args, output, console)
    plan = make_plan(args.table, args, done, args.batch, _tokens_of(args, weights))
    note_plan(plan, console)
    if args.dry_run:
        from .forecast import forecast

        yield forecast(plan, args, output, console)
        return
    with Ledger(output) as ledger:
        ledger.add(plan.errors)
        failed = len(plan.errors)
        if plan.jobs:
            quiet = args.quiet or not args.verbose
            with ray_session(args.address, quiet, include_dashboard=args.dashboard):
                workers = resources(args, args.encoders, args.gpus_per_encoder)
                entries = ray_entries(plan, args, output, workers)
                failed += follow(entries, plan, ledger, console)
        run = ledger.run
    yield from finish(output, run, failed, plan)


def finish(output: Place, run: str, failed: int, plan: Plan) -> Iterator[str]:
    """Write the table of a run that has ended; gives its place. Raises Failure for failures."""
    write_table(output, run)
    yield f"{output}/{TABLE}"
    total = plan.jobs + plan.made + len(plan.errors)
    if failed:
        raise Failure(
            f"{failed} of {counted(total, 'picture')} not made; {output}/{TABLE} says why. Mend "
            "the rows and add --resume."
        )


def _check_options(args: Namespace) -> None:
    if args.grid is not None:
        raise UsageError("--grid goes with the plain engine; leave --engine or --grid out.")
    if args.seeds is not None and args.images != 1:
        raise UsageError("Give --seeds or --images, not both.")
    if args.force and args.layout != FOLDER:
        raise UsageError(
            f"--force with --layout {args.layout} would leave pictures twice; choose another "
            "--output, or add --resume."
        )


def keys_done(args: Namespace, output: Place, console: Console) -> np.ndarray:
    """Keys of the pictures that need not be made."""
    none = np.empty(0, np.uint64)
    if args.force:
        return none
    if args.resume:
        if not args.dry_run and args.layout != FOLDER:
            _adopt_shards(output, console)
        return finished(output)
    if next(read_entries(output), None) is not None:
        raise UsageError(
            f"{output} holds pictures of an earlier run; add --resume to make what is missing, or "
            "choose another --output."
        )
    return none


def _adopt_shards(output: Place, console: Console) -> None:
    """Add to the ledger what shards hold that were written just before a run was killed."""
    known = {entry["file"] for entry in read_entries(output) if "member" in entry}
    found = sorted(shard_names(output) - known)
    if not found:
        return
    with Ledger(output) as ledger:
        for name in found:
            ledger.add(records_of(output, name))
    console.note(f"added to the ledger: {counted(len(found), 'shard')} of a run that was killed")


def _tokens_of(args: Namespace, weights: Weights) -> TokensOf | None:
    """A function for the length of a prompt, where rows may share calls."""
    if args.batch == 1:
        return None
    tokenizer = Krea2Tokenizer(find_tokenizer(weights.text_encoder, weights.tokenizer))

    @lru_cache(10_000)
    def tokens_of(text: str, weighted: bool) -> int:
        return len(tokenize_prompt(tokenizer, text, weighted=weighted).weight_row)

    return tokens_of


def note_plan(plan: Plan, console: Console) -> None:
    """Say what of a table is not to be made, and why."""
    if plan.errors:
        first = plan.errors[0]
        console.note(
            f"{len(plan.errors)} of {counted(plan.rows, 'row')} with errors; row {first['row']}: "
            f"{first['error']}"
        )
    if plan.repeated:
        console.note(f"{counted(plan.repeated, 'picture')} asked for twice and made once")
    if plan.made:
        console.note(f"{plan.made} of {counted(plan.made + plan.jobs, 'picture')} made already")


def follow(entries: Iterator[list[Entry]], plan: Plan, ledger: Ledger, console: Console) -> int:
    """Keep the entries of a run as they come, and show its progress; gives the failures."""
    failed = 0
    with console.bar(plan.jobs, "rendering", unit="picture", smoothing=0.05) as bar:
        try:
            for batch in entries:
                new = plan.take(batch)
                ledger.add({k: v for k, v in entry.items() if k != STOP} for entry in new)
                failed += sum("error" in entry for entry in new)
                if stop := next((entry for entry in new if STOP in entry), None):
                    raise Failure(
                        f"{stop['error']} {int(plan.ended.sum())} of "
                        f"{counted(plan.jobs, 'picture')} tried; what is made stays. Make room and "
                        "add --resume."
                    )
                bar.set_postfix(failed=failed, refresh=False)
                bar.update(len(new))
        except KeyboardInterrupt:
            made = int(plan.ended.sum()) - failed
            console.note(f"{made} of {counted(plan.jobs, 'picture')} made; --resume makes the rest")
            raise
        missing = lost(plan.left())
        ledger.add(missing)
        bar.update(len(missing))
    return failed + len(missing)
