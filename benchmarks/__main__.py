"""Everything that docs/ says about speed and memory, measured and written to RESULTS.md.

    python -m benchmarks [--only block vae ...]

Each part runs in a process of its own with ComfyUI (COMFYUI_PATH, or the one that the scripts set
up in .local). Its numbers are kept in results.json, so that parts measured on other machines stay
beside them with their own date and machine; RESULTS.md is written from all of them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KEPT, REPORT = HERE / "results.json", HERE / "RESULTS.md"
GB = 1e9


def ratio(found: dict[str, list[float]], peer: str) -> str:
    """The peer's time over ours, by turns: median (least to most)."""
    pairs = [theirs / ours for theirs, ours in zip(found[peer], found["ours"], strict=True)]
    return f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def block_report(found: dict[str, Any]) -> str:
    rows = []
    for dtype, runs in found.items():
        times = {name: run["milliseconds"] for name, run in runs.items()}
        for name, run in runs.items():
            rows.append(
                [dtype, name, f"{run['median']:.0f} ms", "1" if name == "ours" else
                 ratio(times, name), str(run["operators"]), f"{run['gigabytes']:.2f} GB"]
            )  # fmt: skip
    return (
        "One full-width block at 4160 tokens without matrix products and attention. Time on this "
        "machine; operators and bytes moved on the path a GPU takes.\n\n"
        + table(["dtype", "", "time", "ours is faster by", "operators", "traffic"], rows)
    )


def vae_report(found: dict[str, Any]) -> str:
    rows = []
    for what, runs in found.items():
        times = {name: run["seconds"] for name, run in runs.items()}
        for name, run in runs.items():
            rows.append(
                [what, name, f"{statistics.median(run['seconds']):.1f} s",
                 "1" if name == "ours" else ratio(times, name), f"{run['peak'] / GB:.2f} GB"]
            )  # fmt: skip
    return "At full width, 512 x 512 px, float32.\n\n" + table(
        ["", "", "time", "ours is faster by", "peak memory"], rows
    )


def text_report(found: dict[str, Any]) -> str:
    rows = []
    for name, seconds in found["seconds"].items():
        rows.append(
            [name, f"{statistics.median(seconds):.1f} s",
             "1" if name == "ours" else ratio(found["seconds"], name),
             f"{found['bytes'][name] / GB:.2f} GB"]
        )  # fmt: skip
    heads = ["", "time", "ours is faster by", "weights held"]
    return (
        f"One prompt, full size, bf16 weights.\n\n{table(heads, rows)}\n\nFor writing ours holds "
        f"{found['bytes']['tail'] / GB:.2f} GB more, the last layer and the final norm, and "
        f"{found['bytes']['token'] / 1000:.0f} kB a token for keys and values."
    )


def counts_report(found: dict[str, Any]) -> str:
    times = {name: run["seconds"] for name, run in found.items()}
    rows = [[name, str(run["calls"]), str(run["tokens"]), str(run["fusions"]),
             f"{statistics.median(run['seconds']):.2f} s",
             "1" if name == "ours" else ratio(times, name)]
            for name, run in found.items()]  # fmt: skip
    return "krea2-nano Raw at 128 px, 28 steps with guidance, a prompt of ten words.\n\n" + table(
        ["", "calls of the model", "tokens a call", "calls of text fusion", "time",
         "ours is faster by"], rows
    )  # fmt: skip


def sharing_report(found: list[dict[str, Any]]) -> str:
    rows = []
    for run in found:
        pairs = [two / one for one, two in zip(run["seconds"]["one"], run["seconds"]["two"],
                                               strict=True)]  # fmt: skip
        rows.append([str(run["tokens"]), f"{statistics.median(pairs):.2f}"])
    return (
        "krea2-nano Raw with guidance, texts of different length: up to 1024 image tokens they "
        "share a call.\n\n" + table(["image tokens", "one call is faster than two by"], rows)
    )


def lossy_report(found: list[dict[str, Any]]) -> str:
    rows = [[run["choice"], f"{run['error']:.2f}", f"{statistics.median(run['ratios']):.2f}"]
            for run in found]  # fmt: skip
    return (
        "Not exact, and off unless chosen. krea2-nano Raw at 128 px, 28 steps with guidance; "
        "errors are mean differences of pixels in 255ths. 8 bits are emulated on a CPU, so their "
        "speed says nothing of a GPU's; attention has the error of SageAttention's arithmetic.\n\n"
        + table(["", "error", "faster by"], rows)
    )


def memory_report(found: dict[str, Any]) -> str:
    rows = []
    for form, loaders in found.items():
        for how, run in loaders.items():
            if run is None:
                rows.append([form, how, "not read", "", "", ""])
                continue
            held = run["loading"]["anonymous"]
            rows.append(
                [form, how, f"{run['file'] / GB:.2f} GB", f"{run['seconds']:.1f} s",
                 f"{held / GB:.2f} GB ({held / run['file']:.2f} of the file)",
                 f"{run['loading']['mapped'] / GB:.2f} GB"]
            )  # fmt: skip
    about = (
        "Peak while a transformer loads, kept as bf16 or as stored (krea2_model makes bf16 of "
        "8-bit files unless it keeps them).\n\n"
    )
    return about + table(["file", "", "size", "time", "anonymous", "mapped"], rows)


def features_report(found: dict[str, Any]) -> str:
    names = {
        "plain": "a step without guidance",
        "weights": "with prompt weights",
        "negative": f"with a negative of {found['negative']} tokens beside it",
        "reference": "with a reference of the image's size",
        "boost": "with a boost of it",
        "apart": "with one that is kept apart, after it was gone through once",
        "control": "with a control LoRA of rank 64",
        "regions": f"with three regions, each with a prompt of {found['negative']} tokens",
        "style": "with a style picture of the image's size, after its inversion",
        "guidance": "with guidance",
    }
    times, rows = found["seconds"], []
    for name, label in names.items():
        cells = [f"{work[name] / work['plain']:.2f}" for work in found["operations"].values()]
        if name in times:
            cells.append(ratio({"ours": times["plain"], name: times[name]}, name))
        rows.append([label, *cells, *[""] * (len(found["operations"]) + 1 - len(cells))])
    head = [f"operations at {size} px" for size in found["operations"]]
    return (
        f"Full width, {found['text']} text tokens, one image, over a plain step: operations of the "
        "whole model, counted; processor time of one block at 512 px.\n\n"
        + table(["", *head, "time"], rows)
    )


# A part's script, and how its numbers are shown.
def large_report(found: dict[str, Any]) -> str:
    rows = []
    for side, ways in found.items():
        both = ways["whole"], ways["tiles"]
        cells = [str(ways["tiles"]["calls"])]
        cells += [f"{ways[way]['operations'] / 1e12:.0f}" for way in ("whole", "sparse", "tiles")]
        cells += [f"{way[part] / GB:.1f} GB" for part in ("transformer", "vae") for way in both]
        rows.append([f"{side} x {side}", *cells])
    head = ["image", "tiles", "TFLOP a step, whole", "sparse", "in tiles", "activations, whole",
            "in tiles", "VAE, whole", "in tiles"]  # fmt: skip
    return (
        "Released sizes in bf16, 512 text tokens, tiles of 1024 px; bytes beside the weights. "
        "Sparse: whole, in a step with sparse attention. Counted.\n\n" + table(head, rows)
    )


def sparse_report(found: dict[str, Any]) -> str:
    times = [
        [f"{size} px", *(f"{statistics.median(runs[way]):.2f} s" for way in ("exact", "sparse"))]
        for size, runs in found.items()
    ]
    return (
        "Attention alone, two heads of 128, on one core; operations of whole steps are under Large "
        "images.\n\n" + table(["image", "exact", "sparse"], times)
    )


PARTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "block": ("A block's element-wise work", block_report),
    "counts": ("What a run does", counts_report),
    "vae": ("VAE", vae_report),
    "text_encoder": ("Text encoder", text_report),
    "sharing": ("One call for two texts", sharing_report),
    "lossy": ("Faster at a price", lossy_report),
    "features": ("Weights, negatives, references, controls, regions", features_report),
    "load_memory": ("Loading", memory_report),
    "large": ("Large images", large_report),
    "sparse": ("Sparse attention", sparse_report),
}
ON_A_GPU = (
    "Nothing was measured on a GPU yet: `bash scripts/gpu_check.sh` does, and writes "
    "benchmarks/gpu/GPU.md."
)


def comfyui() -> Path:
    if path := os.environ.get("COMFYUI_PATH"):
        return Path(path).resolve()
    found = sorted((ROOT / ".local").glob("ComfyUI-*"))
    if not found:
        sys.exit("There is no ComfyUI. Run `bash scripts/setup.sh test`, or set COMFYUI_PATH.")
    return found[-1]


def machine() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [
            line
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {platform.system()}"


def versions(folder: Path) -> str:
    packages = ("torch", "comfy-kitchen", "diffusers", "transformers")
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    text = (folder / "comfyui_version.py").read_text() if folder.is_dir() else ""
    number = text.rpartition('__version__ = "')[2].partition('"')[0]
    return ", ".join([f"ComfyUI {number}", *found, f"Python {platform.python_version()}"])


def measure(part: str, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", str(HERE / f"{part}.py")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"benchmarks/{part}.py failed.")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(folder),
        "numbers": json.loads(done.stdout.strip().splitlines()[-1]),
    }


def report(kept: dict[str, Any]) -> str:
    sections = [
        "# Results\n\nWritten by `python -m benchmarks`. Ratios are of runs in turns: the median "
        "(least to most), above 1 where ours is faster. core is ComfyUI's own Krea 2."
    ]
    for part, (title, show) in PARTS.items():
        if part in kept:
            run = kept[part]
            where = f"{run['date']}, {run['machine']}. {run['versions']}."
            sections.append(f"## {title}\n\n{show(run['numbers'])}\n\n{where}")
    sections.append(f"## On a GPU\n\n{ON_A_GPU}")
    return "\n\n".join(sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--report", action="store_true", help="write RESULTS.md again, measure none"
    )
    options = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for part in () if options.report else options.only:
        print(f"{part} ...", flush=True)
        kept[part] = measure(part, comfyui())
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    REPORT.write_text(report(kept))
    print(f"Written: {REPORT}")


if __name__ == "__main__":
    main()
