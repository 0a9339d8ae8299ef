"""What a server has to survive. Each check raises Wrong, or gives its figures in words."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from headless import ROOT, ComfyClient, ComfyServer, JobError
from nano_training.judge import judge

from .jobs import (
    PICTURE,
    RAW,
    TRUNCATED,
    TURBO,
    Wrong,
    armed,
    check,
    make_jobs,
    nano_graph,
    pictures,
    run_jobs,
)

NANO_FILES = ROOT / "krea2_model" / "nano"
# Settings for pictures that are only compared with each other.
QUICK: dict = {"preset": "custom", "steps": 2, "guidance": 0.0}
PACKS = {"comfyui-krea2-kit": ROOT, "krea2-tests": Path(__file__).parent / "faults"}


def prepare(base: Path) -> None:
    """The files that the checks need, in the models folder of `base`."""
    models = base / "models"
    for folder in ("diffusion_models", "vae", "loras"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    whole = (NANO_FILES / "krea2_nano_turbo.safetensors").read_bytes()
    (models / "diffusion_models" / TRUNCATED).write_bytes(whole[: len(whole) // 2])


def restart(server: ComfyServer) -> None:
    server.stop()
    server.start()


def queue(
    server: ComfyServer,
    count: int,
    alone: int = 20,
    most_growth: float = 50,
    start_anew: Callable[[ComfyServer], object] = restart,
) -> str:
    """Jobs of every kind: flat memory in its last four fifths, and right pictures.

    alone: how many pictures are made once more, each alone, by the server started anew.
    most_growth: in MB.
    """
    started, memory, numbers = time.monotonic(), [], defaultdict(int)
    verdicts, kept = defaultdict(list), []
    process = psutil.Process(server.pid)
    done = run_jobs(server, make_jobs(count))
    for number, (job, found) in enumerate(done, start=1):
        numbers[job.kind] += 1
        if job.scene:
            for part, right in judge((found[0] / 255).astype(np.float32), job.scene).items():
                verdicts[part].append(right)
        if job.kind == PICTURE and len(kept) < alone * number / count:
            kept.append((job.graph, found))
        memory.append(process.memory_info().rss / 2**20)
        if number % 50 == 0:
            print(f"  {number} of {count} jobs, {memory[-1]:.0f} MB", flush=True)
    seconds = time.monotonic() - started
    settled = memory[count // 5 :]
    growth = float(np.polyfit(np.arange(len(settled)), settled, 1)[0]) * len(settled)
    check(growth < most_growth, f"Memory grew by {growth:.0f} MB: {memory[:: count // 10]}")
    shares = {part: 100 * float(np.mean(rights)) for part, rights in verdicts.items()}
    check(min(shares.values()) >= 80, f"Pictures do not show what was asked for: {shares}")
    start_anew(server)
    for graph, found in kept:
        again = pictures(server, graph)
        same = all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
        check(same, f"Alone, a job gives another picture: {graph}")
    kinds = ", ".join(f"{number} {kind}" for kind, number in numbers.items())
    points = ", ".join(f"{memory[i]:.0f}" for i in range(count // 10 - 1, count, count // 10))
    right = ", ".join(f"{part} {share:.0f} %" for part, share in shares.items())
    return (
        f"{count} jobs ({kinds}) in {seconds:.0f} s. Memory of the process after each tenth, in "
        f"MB: {points}; the line through the last four fifths rises by {growth:.0f} MB. What "
        f"{len(verdicts['background'])} pictures show, read back: {right}. {len(kept)} were made "
        "again, each alone, by a server started anew: the same to the pixel."
    )


def clients(server: ComfyServer, count: int, each: int) -> str:
    """Several programs at once, each with a connection and pictures of its own."""
    size = {"width": 96, "height": 96}
    graphs = {
        (client, job): nano_graph(f"a {colour} star", seed=1000 * client + job, **size)
        for client in range(count)
        for job, colour in zip(range(each), ("red", "blue", "green", "pink", "cyan"), strict=False)
    }

    def work(number: int) -> dict:
        client, found = ComfyClient(server.address), {}
        for job in range(each):
            steps: list[tuple[int, int]] = []
            outputs = client.run(
                graphs[number, job],
                lambda node, step, total, steps=steps: steps.append((step, total)),
                timeout=300,
            )
            check((8, 8) in steps, f"Client {number} did not hear of its last step: {steps}")
            found[number, job] = client.images(outputs)
        return found

    started = time.monotonic()
    found: dict = {}
    with ThreadPoolExecutor(count) as pool:
        for part in pool.map(work, range(count)):
            found |= part
    seconds = time.monotonic() - started
    for key in [(client, client % each) for client in range(count)]:
        # A server that has the job in its cache would only name the file it has.
        graphs[key]["6"]["inputs"]["filename_prefix"] = "alone"
        (png,) = server.images(server.run(graphs[key], timeout=300))
        check(_same(png, found[key][0]), f"The picture of client and job {key} is not its own.")
    return (
        f"{count} clients, {each} jobs each, in {seconds:.0f} s: everyone heard of the steps of "
        "their jobs and got their pictures, the same as alone."
    )


def kill(server: ComfyServer) -> str:
    """SIGKILL in the middle of a job, with others waiting; then a start on the same folders."""
    before = pictures(server, nano_graph(seed=5, **QUICK))
    folder = server.base / "output"
    running = server.post(nano_graph(seed=6, preset="custom", steps=1000, guidance=0.0))
    for seed in (7, 8, 9):
        server.post(nano_graph(seed=seed))
    while server.job(running)["status"] != "in_progress":
        time.sleep(0.02)
    time.sleep(1)
    server.kill()
    started = time.monotonic()
    server.start()
    seconds = time.monotonic() - started
    for file in folder.rglob("*.png"):
        with Image.open(file) as image:
            image.load()
    # With the cache gone, it is made again.
    after = pictures(server, nano_graph(seed=5, **QUICK))
    check(np.array_equal(before[0], after[0]), "After the restart the same job gives another.")
    check(server.job(running) == {}, "The job that was killed is known after the restart.")
    return (
        f"Killed (SIGKILL) in the middle of a job with three waiting. Started again in "
        f"{seconds:.0f} s; every PNG in the output folder is whole and the same job gives the "
        "same picture. ComfyUI keeps its queue in memory: what was in it has to be posted again."
    )


def full_disk(server: ComfyServer) -> str:
    """A disk of 64 KB behind the output folder. Mounting it needs root."""
    folder = server.base / "output"
    server.stop()
    _run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder))
    try:
        server.start()
        filler = folder / "filler"
        filler.write_bytes(b"\0" * 61440)
        message = _message(server, nano_graph(seed=21))
        check("No space left on device" in message, message)
        left = [file.name for file in folder.iterdir()]
        check(left == ["filler"], f"Something is left of the picture: {left}")
        filler.unlink()
        check(pictures(server, nano_graph(seed=22)), "There is no picture.")
    finally:
        server.stop()
        _run("umount", str(folder))
    server.start()
    return (
        f'The job fails with "{message}" and leaves no file; with room again, the next job '
        "saves its picture."
    )


def replaced_files(server: ComfyServer) -> str:
    """Other content under the same name, between two runs: transformer and VAE."""
    # ComfyUI looks for new files in a folder when the folder's time has changed.
    models = server.base / "models"
    expected = {
        variant: pictures(server, nano_graph(model=name, seed=31, **QUICK))[0]
        for variant, name in (("turbo", TURBO), ("raw", RAW))
    }
    check(not np.array_equal(*expected.values()), "Raw and Turbo give one picture.")
    file = models / "diffusion_models" / "replaced.safetensors"
    settings = {"model": file.name, "text_encoder": TURBO, "vae": TURBO, **QUICK}
    ways: tuple[tuple[str, Callable], ...] = (
        ("new", shutil.copyfile),
        ("by renaming another file", _rename_copy),
        ("by writing into it", shutil.copyfile),
    )
    for (_, put), variant in zip(ways, ("turbo", "raw", "turbo"), strict=True):
        put(NANO_FILES / f"krea2_nano_{variant}.safetensors", file)
        (found,) = pictures(server, nano_graph(seed=31, **settings))
        check(np.array_equal(found, expected[variant]), f"The {variant} file was not read.")
    file.unlink()
    vae = models / "vae" / "replaced.safetensors"
    shutil.copyfile(NANO_FILES / "krea2_nano_vae.safetensors", vae)
    graph = nano_graph(seed=31, vae=vae.name, **QUICK)
    (found,) = pictures(server, graph)
    check(np.array_equal(found, expected["turbo"]), "The VAE of the folder paints another picture.")
    shutil.copyfile(NANO_FILES / "krea2_nano_raw.safetensors", vae)
    message = _message(server, graph)
    check("is a Krea 2 transformer; expected a Qwen-Image VAE" in message, message)
    vae.unlink()
    return (
        "A transformer replaced under its name, once by renaming another file over it and once by "
        "writing into it, is read anew: the picture is that of the new file, to the pixel. A VAE "
        f'replaced by something else: "{message}"'
    )


def read_only_models(server: ComfyServer) -> str:
    """A models folder in which nothing can be written."""
    models = server.base / "models"
    name = "read_only.safetensors"
    shutil.copyfile(NANO_FILES / "krea2_nano_turbo.safetensors", models / "diffusion_models" / name)
    (expected,) = pictures(server, nano_graph(seed=41, **QUICK))
    with _read_only(models):
        before = _tree(models)
        graph = nano_graph(seed=41, model=name, text_encoder=TURBO, vae=TURBO, **QUICK)
        (found,) = pictures(server, graph)
        check(_tree(models) == before, "Something in the models folder has changed.")
    check(np.array_equal(found, expected), "The picture is another.")
    (models / "diffusion_models" / name).unlink()
    return "The same picture as ever, and no file or time in the folder has changed."


def out_of_memory(server: ComfyServer) -> str:
    """The first call of each part runs out of memory; for the VAE, then every call."""
    lines = []
    graph = nano_graph("a pink ring on black", seed=51, **QUICK)
    (expected,) = pictures(server, graph)
    for part, words in (
        ("transformer", "The transformer, at 1 image of 128 x 128 px, ran out of memory. Make"),
        ("text encoder", "The text encoder ran out of memory. Shorten the prompt"),
        ("VAE decoder", "The VAE ran out of memory. There are no tiles below 256 px"),
    ):
        # A prompt of its own, since the encoder keeps the last ones.
        message = _message(server, armed(nano_graph(f"a ring, {part}", seed=51, **QUICK), part))
        check(words in message, message)
        lines.append(f'- {part}: "{message.partition(" (Allocation")[0]}"')
        (found,) = pictures(server, graph)
        check(np.array_equal(found, expected), f"After the {part}'s error a picture is another.")
    large = {"width": 384, "height": 384, "preset": "custom", "steps": 1, "guidance": 0.0}
    (whole,) = pictures(server, nano_graph(seed=52, **large))
    (tiled,) = pictures(server, armed(nano_graph(seed=52, **large), "VAE decoder"))
    difference = float(np.abs(whole - tiled).mean())
    check(0 < difference < 16, f"The tiled picture is {difference:.1f} of 255 away.")
    lines.append(
        "- VAE decoder at 384 x 384 px: it goes on in tiles, without an error; the picture is "
        f"{difference:.2f} of 255 away on average"
    )
    return "\n".join(["The first call of each fails; the next job gives its picture.", *lines])


def _message(server: ComfyServer, graph: dict) -> str:
    """What a job that must fail says, on one line."""
    try:
        pictures(server, graph)
    except JobError as error:
        return " ".join(str(error).split())
    raise Wrong("A job that must fail ended well.")


def _same(one: bytes, other: bytes) -> bool:
    from .jobs import pixels

    return np.array_equal(pixels(one), pixels(other))


def _rename_copy(source: Path, target: Path) -> None:
    copy = target.with_suffix(".part")
    shutil.copyfile(source, copy)
    # As old and as large as what it replaces: only its content tells.
    times = target.stat()
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    copy.replace(target)


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """By permissions, and for root, whom they do not stop, by mounting it so."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths if not path.is_symlink()}
    mounted = os.geteuid() == 0
    if mounted:
        _run("mount", "--bind", str(folder), str(folder))
        _run("mount", "-o", "remount,ro,bind", str(folder))
    else:
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        if mounted:
            _run("umount", str(folder))
        else:
            for path, mode in modes.items():
                path.chmod(mode)


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
