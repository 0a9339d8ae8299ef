"""`krea2 vary` and `krea2 walk`: neighbours of a picture, and frames between two."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path

from ..features.variations import frame_shares
from ..images.output_files import check_animation, save_animation
from .checks import check_folder, check_folders, check_machine, check_output, check_picture
from .errors import UsageError
from .generate import drawn, merged, named_options, save
from .kept import settings_in
from .model_files import take_from_models
from .progress import Console
from .settings import check_names
from .vary_options import SECONDS

_SEEDS = 2**64


def vary(args: Namespace, typed: list[str]) -> Iterator[Path]:
    """Make neighbours of a picture by the settings in its file; yields each as it is written."""
    settings = settings_in(args.picture)
    named = named_options(typed, "vary")
    check_names({n: v for n, v in settings.items() if n not in named}, args.picture)
    base = merged(settings, typed, args, "vary")
    check_folders(base, [base])
    base = drawn(base)
    first = args.variation_seed
    if first is None:
        first = max([base.seed, *(seed for seed, _ in base.vary)]) + 1
    console = Console(args.quiet)
    take_from_models(base)
    check_output(base)
    check_picture(base)
    weights = check_machine(base)
    from .painter import Painter

    painter = Painter(base, weights, console)
    prompts = [base.prompt] * args.images
    if args.expand:
        prompts = painter.expand(base.prompt, args.images, first % _SEEDS)
    taken: set[Path] = set()
    with painter.keep_texts(2):
        for number, prompt in enumerate(prompts):
            one = copy(base)
            one.prompt = prompt
            one.vary = [*base.vary, ((first + number) % _SEEDS, args.strength)]
            picture = painter.paint(one, f"{number + 1} of {args.images}")
            yield save(picture.image, one, picture.results, args.output, taken, console)


def walk(args: Namespace) -> Iterator[Path]:
    """Make the frames; yields each file as it is written, and the animation at the end."""
    console = Console(args.quiet)
    _check_walk(args)
    check_folders(args, [args])
    take_from_models(args)
    files = [args.output / f"{n:04d}.{args.format}" for n in range(1, args.frames + 1)]
    check_folder(args.output)
    if there := [file for file in files if file.exists() and not args.force]:
        raise UsageError(
            f"{there[0]} is there already; choose another --output, or --force to replace it."
        )
    if args.animation is not None:
        check_animation(args.animation)
        if args.animation.resolve() in [file.resolve() for file in files]:
            raise UsageError(
                f"{args.animation} is one of the frames too; choose another --animation."
            )
        if args.animation.exists() and not args.force:
            raise UsageError(
                f"{args.animation} is there already; choose another --animation, or --force."
            )
    frames = list(_frames(args))
    check_picture(frames[0])
    check_picture(frames[-1])
    weights = check_machine(args)
    from .painter import Painter

    painter = Painter(args, weights, console)
    taken: set[Path] = set()
    with painter.keep_texts(4):
        for number, (one, file) in enumerate(zip(frames, files, strict=True), 1):
            picture = painter.paint(one, f"{number} of {len(files)}")
            yield save(picture.image, one, picture.results, file, taken, console)
    if args.animation is not None:
        save_animation(_there_and_back(files, args.back), args.animation, args.seconds)
        yield args.animation


def _check_walk(args: Namespace) -> None:
    if args.to_prompt is None and args.to_seed is None:
        raise UsageError("There is nothing to walk to; give a second prompt, --to-seed N, or both.")
    if args.to_prompt is not None and not args.to_prompt.strip():
        raise UsageError("The second prompt is empty; expected words, or leave it out.")
    if args.images != 1:
        raise UsageError(f"--images is {args.images}; --frames says how many there are.")
    for name, default in (("back", False), ("seconds", SECONDS)):
        if args.animation is None and getattr(args, name) != default:
            raise UsageError(
                f"--{name} is of the animation; add --animation FILE, or leave it out."
            )
    if args.blend is not None:
        raise UsageError("--blend is set by the walk for each frame; give a second prompt.")


def _frames(args: Namespace) -> Iterator[Namespace]:
    """The options of each frame; the last is the plain picture of the second prompt and seed."""
    base = copy(args)
    base.blend = args.to_prompt
    base = drawn(base)
    to_prompt = base.blend
    for share in frame_shares(args.frames):
        one = copy(base)
        one.blend = None
        if to_prompt is not None and share == 1:
            one.prompt = to_prompt
        elif to_prompt is not None and share > 0:
            one.blend, one.blend_share = to_prompt, share
        if args.to_seed is not None and share == 1:
            one.seed, one.vary = args.to_seed, []
        elif args.to_seed is not None and share > 0:
            one.vary = [*base.vary, (args.to_seed, share)]
        yield one


def _there_and_back(files: Sequence[Path], back: bool) -> list[Path]:
    return [*files, *(files[-2:0:-1] if back else ())]
