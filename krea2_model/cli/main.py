"""The entry point: find the command, run it, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Iterable, Sequence

from .errors import FAILED, STOPPED, UsageError, explain, suggestion
from .parser import COMMANDS, build_parser, command_parser
from .picture_options import WEIGHTS
from .train_options import TRAINING

# For a closed pipe, as a shell reports a command that SIGPIPE ended.
_PIPE_CLOSED = 141

# Options of other programs, and what we have in their place.
OTHERS = {
    **dict.fromkeys(("--cfg", "--cfg-scale", "--guidance-scale"), "--guidance, CFG scale less 1"),
    **dict.fromkeys(("--num-inference-steps", "--num-steps"), "--steps"),
    "--negative-prompt": "--negative",
    **dict.fromkeys(("-n", "--n", "--n-iter", "--num-images", "--batch-size"), "--images"),
    **dict.fromkeys(("--init-image", "--init-img", "--input-image"), "--start-image"),
    **dict.fromkeys(("--ckpt", "--checkpoint", "--unet"), "--transformer, or --model"),
    **dict.fromkeys(("-W", "-H", "--size", "--resolution"), "--width and --height"),
    "--strength": "--denoise",
    **dict.fromkeys(("--sampler", "--sampler-name", "--scheduler"), "always Euler"),
    **dict.fromkeys(("-p", "--prompt"), "the first word after krea2, in quotes"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code. 0: done, 1: failed, 2: wrong, 130: stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = argparse.Namespace(verbose="--verbose" in words)
    try:
        if not words:
            build_parser().print_help()
            return 0
        args = parse(words)
        _set_up_log(args.quiet)
        for line in run(args, words):
            print(line, flush=True)
    except BrokenPipeError:
        # Python would fail again when it flushes stdout at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except (Exception, KeyboardInterrupt) as error:
        return _report(error, args)
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """Options of a command line whose first word is a command, an option or a prompt."""
    parser, first = build_parser(), words[0]
    is_prompt = first not in (*COMMANDS, "-h", "--help", "--version")
    if is_prompt:
        if not any(not word.startswith("-") for word in words):
            raise UsageError(
                f"There is no prompt and no command; see krea2 --help.{_close_option(first)}"
            )
        words = ["generate", *words]
    args, unknown = parser.parse_known_args(words)
    if is_prompt:
        _refuse_mistyped(first, args, unknown)
    if unknown:
        raise UsageError(_unknown(unknown, words[0]))
    return args


def _set_up_log(quiet: bool) -> None:
    from .progress import LogHandler

    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level, handlers=[LogHandler()])


def run(args: argparse.Namespace, words: list[str]) -> Iterable[object]:
    """The results of a command, a line each. Its module is imported here."""
    if args.command == "models":
        from .models import models

        return models(args)
    if args.command in TRAINING:
        from .train import train

        return train(args)
    if args.command in ("curate", "pick", "merge"):
        from . import train as training

        return getattr(training, args.command)(args)
    if args.command == "render" and args.engine != "plain":
        from .rendering import render as render_many

        return render_many(args)
    if args.command == "render":
        from .render import render

        return render(args)
    if args.command == "grid":
        from .grid import grid

        return grid(args, words[1:])
    if args.command == "serve":
        from .rendering import serve

        return serve(args)
    if args.command in ("expand", "describe"):
        from . import writing

        return getattr(writing, args.command)(args)
    if args.command == "styles":
        from .styles import styles

        return styles(args)
    if args.command in ("vary", "walk"):
        from . import vary

        return vary.vary(args, words[1:]) if args.command == "vary" else vary.walk(args)
    if args.command in ("generate", "again"):
        from .generate import again, generate

        return again(args, words[1:]) if args.command == "again" else generate(args)
    from . import files

    return getattr(files, args.command)(args)


def _refuse_mistyped(first: str, args: argparse.Namespace, unknown: list[str]) -> None:
    """Refuse a first word that is nearly a command, unless it reads as a prompt.

    It reads as one if it is more than a word, or if the line names weights and nothing is unknown.
    """
    named = any(getattr(args, name) is not None for name in WEIGHTS)
    hint = "" if " " in first else suggestion(first, COMMANDS, 0.7)
    if hint and (unknown or not named):
        raise UsageError(
            f"There is no command {first}.{hint} To make a picture of that word: "
            f"krea2 generate {first}"
        )


def _unknown(words: list[str], command: str) -> str:
    options = [word for word in words if word.startswith("-")]
    if not options:
        quoted = " ".join(words)
        return (
            f"{quoted} is one word too many. Write a prompt of several words in quotes."
            if command == "generate"
            else f"{quoted} is too much; see krea2 {command} --help."
        )
    option = options[0].partition("=")[0]
    known = command_parser(command)._option_string_actions
    ours = OTHERS.get(option.replace("_", "-"), "")
    if ours and (not ours.startswith("--") or ours.split()[0].strip(",") in known):
        return f"There is no option {option} of {command}; here it is {ours}."
    hint = suggestion(option, known) or f" krea2 {command} --help lists them."
    return f"There is no option {option} of {command}.{hint}"


def _close_option(word: str) -> str:
    return suggestion(word, command_parser("generate")._option_string_actions)


def _report(error: BaseException, args: argparse.Namespace) -> int:
    explained = explain(error, vars(args))
    verbose = getattr(args, "verbose", False) or bool(os.environ.get("KREA2_DEBUG"))
    if verbose or explained is None:
        traceback.print_exception(error)
    if explained is None:
        print("krea2: this is an error of krea2's; please report the text above", file=sys.stderr)
        return FAILED
    message, code = explained
    word = "" if code == STOPPED else "error: "
    print(f"krea2: {word}{message}", file=sys.stderr)
    return code
