"""GPU.md from results.json: short tables, one card named, each time beside what it can be at best.

Ratios are of runs in turns: the median (least to most), above 1 where ours is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ABOUT = (
    "Written by `bash scripts/gpu_check.sh`. Ratios are of runs in turns: the median (least to "
    "most), above 1 where ours is faster; core is ComfyUI's own Krea 2. Weights are random ones of "
    "the released sizes. A floor is the least that the work takes by its operations and bytes, at "
    "the rates this card reached alone."
)


def write_report(content: dict[str, Any], path: Path) -> None:
    path.write_text(report(content), encoding="utf-8")


def report(content: dict[str, Any]) -> str:
    sections, run = content["sections"], content["run"]
    parts = [heading(sections, run), verdicts(sections)]
    for name, (title, show) in TABLES.items():
        section = sections.get(name)
        if section is None:
            continue
        parts.append(f"## {title}")
        if section.get("error"):
            parts.append(f"{section['state']}: {code(section['error'])}")
        if section["rows"]:
            parts.append(show(section["rows"]))
    return "\n\n".join(parts) + "\n"


def heading(sections: dict[str, Any], run: Row) -> str:
    rows = sections.get("machine", {}).get("rows", [])
    by_name = {row["what"]: row for row in rows}
    card, software = by_name.get("card", {}), by_name.get("software", {})
    lines = ["# On a GPU", ABOUT]
    if run.get("tiny"):
        lines.append("**Made with --tiny: small sizes on a CPU. No number here means anything.**")
    named = ", ".join(f"{key} {value}" for key, value in software.items() if key != "what")
    lines.append(f"{run.get('date', '')}, {run.get('card', 'unknown card')}, driver "
                 f"{card.get('driver_version', 'unknown')}. {named}.")  # fmt: skip
    return "\n\n".join(lines)


def verdicts(sections: dict[str, Any]) -> str:
    """Failures first: sections that did not end, and rows that did not pass."""
    wrong, passed = [], 0
    for name, section in sections.items():
        if section["state"] != "done":
            first = section.get("error", "").partition("\n")[0]
            wrong.append(f"- {name}: {section['state']} {code(first) if first else ''}".rstrip())
        for row in section["rows"]:
            passed += row.get("passed") is True
            if row.get("passed") is False:
                why = row.get("error", "")
                why = f": {code(why)}" if isinstance(why, str) and why else ""
                wrong.append(f"- {name}: {row['what']} did not pass{why}")
    return "\n".join([f"{passed} checks passed, {len(wrong)} did not.", *wrong])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split())[:500] + "`"


def number(value: Any, form: str = ".1f", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def ratio(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, list):
        return f"{value:.2f}"
    median, least, most = value
    return f"{median:.2f} ({least:.2f} to {most:.2f})"


def mark(row: Row) -> str:
    return {True: "yes", False: "**no**"}.get(row.get("passed"), "")


def machine_table(rows: list[Row]) -> str:
    by_name = {row["what"]: row for row in rows}
    parts = []
    for what in ("backends", "card", "clocks afterwards"):
        values = {k: v for k, v in by_name.get(what, {}).items() if k not in ("what", "passed")}
        parts.append(f"{what}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    for what in ("copy", "copy from pinned memory"):
        if what in by_name:
            parts.append(f"{what}: {by_name[what]['tb_s']:.3f} TB/s")
    products = [row for row in rows if row["what"] == "products" and "ms" in row]
    parts.append(table(["products of a block", "tokens", "time", "TFLOP/s"], [
        [row["form"], str(row["tokens"]), number(row["ms"], ".3f", " ms"), number(row["tflops"])]
        for row in products]))  # fmt: skip
    attention = [row for row in rows if row["what"] == "attention"]
    parts.append(table(["attention of a block", "heads", "tokens", "time", "TFLOP/s"], [
        [row["backend"], "grouped" if row["grouped"] else "repeated", str(row["tokens"]),
         number(row["ms"], ".3f", " ms") or "not there", number(row.get("tflops"))]
        for row in attention]))  # fmt: skip
    return "\n\n".join(parts)


def checks_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        errors = row.get("errors", {})
        others = ", ".join(f"{n} {e:.1e}" for n, e in errors.items() if n != "ours")
        ours = number(errors.get("ours"), ".1e")
        if "largest_difference" in row:
            ours = f"{row['largest_difference']:.2f} of 255"
        limit = number(row.get("limit"), ".1e")
        lines.append([row["what"], ours, others, limit, mark(row)])
    return table(["", "ours", "others", "limit", "passed"], lines)


def beside(row: Row, what: str, form: str, unit: str) -> str:
    """Ours / core's, the latter only where there is one."""
    values = [number(row.get(f"{who}_{what}"), form) for who in ("ours", "core")]
    return " / ".join(value for value in values if value) + unit


def step_table(rows: list[Row]) -> str:
    head = ["weights", "px", "text", "TFLOP", "ours", "floor", "over floor", "core", "diffusers",
            "bf16", "clock, power",
            "host ours / core", "peak ours / core", "estimate"]  # fmt: skip
    lines = []
    for row in rows:
        if "ours_ms" not in row:
            continue
        sizes = [row["form"], str(row["pixels"]), str(row["text"])]
        times = [number(row["ours_ms"], ".1f", " ms"), number(row.get("floor_ms"), ".1f", " ms"),
                 number(row.get("of_floor"), ".2f")]  # fmt: skip
        ratios = [ratio(row.get(f"{peer}_ratio")) for peer in ("core", "diffusers", "bf16")]
        costs = [beside(row, "host_ms", ".1f", " ms"), beside(row, "peak_gb", ".2f", " GB"),
                 number(row.get("estimate_gb"), ".2f", " GB")]  # fmt: skip
        work = [number(row["product_tflop"] + row["attention_tflop"])]
        state = [", ".join(value for value in row["card"].values() if value)]
        lines.append(sizes + work + times + ratios + state + costs)
    return table(head, lines)


def image_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "ours_s" in row:
            ratios = [ratio(row.get(f"{peer}_ratio")) for peer in ("core", "diffusers")]
            times = [number(row.get(f"{what}_s"), ".2f", " s") for what in ("ours", "floor")]
            lines.append([row["what"], str(row["calls_a_step"]), *times, *ratios, mark(row)])
    return table(["", "calls a step", "ours", "floor", "core", "diffusers", "finite"], lines)


def sparse_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "ours_ms" in row:
            times = [number(row[f"{name}_ms"], ".1f", " ms") for name in ("ours", "exact")]
            memory = [number(row[f"{name}_peak_gb"], ".2f", " GB") for name in ("ours", "exact")]
            lines.append(
                [str(row["pixels"]), *times, ratio(row["exact_ratio"]), " / ".join(memory)]
            )
    return table(["px", "sparse", "exact", "faster by", "peak"], lines)


def candidate_table(rows: list[Row]) -> str:
    head = ["switch", "px", "off", "on", "faster by", "rate", "of copy", "host off / on",
            "difference", "limit", "verdict", "passed"]  # fmt: skip
    lines, bits, absent = [], [], []
    for row in rows:
        if "not_here" in row:
            absent.append(f"{row['what']}: not here, {row['not_here']}")
        elif "differs_in" in row:
            bits.append(f"{row['what']} {'differ' if row['differs_in'] else 'are the same'}")
        elif "on_ms" in row:
            times = [number(row[f"{name}_ms"], ".3f", " ms") for name in ("off", "on")]
            hosts = [number(row.get(f"{name}_host_ms"), ".1f") for name in ("off", "on")]
            lines.append([
                row["what"], str(row.get("pixels", "")), *times, ratio(row["off_ratio"]),
                number(row.get("on_gb_s"), ".0f", " GB/s"), number(row.get("of_copy"), ".2f"),
                " / ".join(filter(None, hosts)), number(row["error"], ".1e"),
                number(row["limit"], ".1e"), row["verdict"], mark(row)])  # fmt: skip
    return "\n\n".join(filter(None, [table(head, lines), "; ".join(bits), "; ".join(absent)]))


def pipeline_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "seconds" in row:
            times = [number(row[what], ".2f", " s") for what in ("seconds", "first_s")]
            memory = [number(row.get(f"{what}_gb"), ".1f", " GB") for what in ("peak", "limit")]
            lines.append([row["what"], *times, *memory, number(row["error"], ".1e"), mark(row)])
    head = ["", "an image", "the first", "VRAM peak", "limit", "difference", "passed"]
    return table(head, lines)


def part_table(rows: list[Row]) -> str:
    head = ["", "px or tokens", "ours", "floor", "core", "diffusers", "peak ours / core",
            "estimate"]  # fmt: skip
    lines = []
    for row in rows:
        if "ours_ms" not in row:
            continue
        times = [number(row["ours_ms"], ".1f", " ms"), number(row.get("floor_ms"), ".1f", " ms")]
        ratios = [ratio(row.get(f"{peer}_ratio")) for peer in ("core", "diffusers")]
        costs = [beside(row, "peak_gb", ".2f", " GB"), number(row.get("estimate_gb"), ".2f", " GB")]
        size = str(row.get("pixels") or row.get("tokens"))
        lines.append([row["what"], size, *times, *ratios, *costs])
    return table(head, lines)


def compile_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "ours_ms" in row:
            step = number(row["ours_ms"] / row["steps"], ".1f", " ms")
            first = number(row["first_run_s"], ".1f", " s")
            error = number(row["error"], ".1e")
            floor, speed = number(row["floor_ms"], ".1f", " ms"), ratio(row["eager_ratio"])
            lines.append(
                [row["what"], str(row["pixels"]), first, step, floor, speed, error, mark(row)]
            )
    return table(["", "px", "first run", "a step", "floor", "faster by", "error", "passed"], lines)


def managed_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        error = row.get("error")
        shown = code(error) if isinstance(error, str) else number(error, ".1e")
        times = [number(row.get("step_s"), ".3f", " s"), number(row.get("floor_s"), ".3f", " s"),
                 number(row.get("first_s"), ".1f", " s")]  # fmt: skip
        memory = [number(row.get(f"{what}_gb"), ".1f", " GB") for what in ("loaded", "card_free")]
        lines.append([row["what"], *times, *memory, shown, mark(row)])
    head = ["", "a step", "floor", "first run", "loaded", "card free", "error", "passed"]
    text = "".join(
        f"\n\nAfterwards {row['vram_gb']:.2f} GB of VRAM and {row['host_gb']:.2f} GB of main "
        "memory are held beyond before."
        for row in rows
        if "vram_gb" in row
    )
    return table(head, lines) + text


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "correct": ("Correct", checks_table),
    "kernels": ("Kernels", checks_table),
    "training": ("Training", checks_table),
    "nano": ("krea2-nano here and on the CPU", checks_table),
    "step": ("A step in bf16", step_table),
    "fp8": ("A step in fp8_scaled", step_table),
    "formats": ("A step in int8 and GGUF", step_table),
    "sparse": ("Sparse attention", sparse_table),
    "images": ("Whole runs of the sampler", image_table),
    "candidates": ("Switches, off and on", candidate_table),
    "pipeline": ("Whole images without ComfyUI, fp8", pipeline_table),
    "vae": ("VAE", part_table),
    "encoder": ("Text encoder", part_table),
    "compile": ("Compiled", compile_table),
    "dynamic": ("Managed, dynamic VRAM", managed_table),
    "static": ("Managed, without dynamic VRAM", managed_table),
    "machine": ("The card, and what it reaches", machine_table),
}
