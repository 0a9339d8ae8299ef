"""The check on a GPU, tried on a CPU: every section runs, and none can stop those after it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest

from benchmarks.__main__ import comfyui
from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import report, rooflines, worker
from benchmarks.gpu.results import Results
from benchmarks.gpu.sections import SECTIONS, Section, processes
from krea2_model.checkpoints.gguf import FORMATS
from krea2_model.nn.switches import SWITCHES

ROOT = Path(__file__).resolve().parents[2]
NAMES = [section.name for section in SECTIONS]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The whole check with --tiny: how it ended, and all that it wrote."""
    out = tmp_path_factory.mktemp("gpu")
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui()), "PYTHON": sys.executable}
    for variable in ("PYTHONPATH", "OUT"):
        environment.pop(variable, None)
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--tiny", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out)
    results = json.loads((out / "results.json").read_text())
    return done, results["sections"], (out / "GPU.md").read_text()


def test_every_section_runs_to_its_end(tiny):
    done, sections, _ = tiny
    assert {name: section.get("error") for name, section in sections.items()} == dict.fromkeys(
        NAMES
    )
    assert all(section["state"] == "done" and section["rows"] for section in sections.values())
    wrong = [(name, row) for name, section in sections.items()
             for row in section["rows"] if row.get("passed") is False]  # fmt: skip
    assert wrong == [] and done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_rows_have_their_numbers(tiny):
    _, sections, _ = tiny
    rows = {name: section["rows"] for name, section in sections.items()}
    for row in rows["step"]:
        assert row["ours_ms"] > 0 and row["floor_ms"] > 0 and len(row["diffusers_ratio"]) == 3
        assert row["core_ratio"][1] <= row["core_ratio"][0] <= row["core_ratio"][2]
    assert all("core_ratio" in row for row in rows["fp8"])
    assert all(row["floor_ms"] > 0 for row in rows["vae"] + rows["encoder"] + rows["compile"])
    assert all(row["floor_s"] > 0 for row in rows["images"])
    assert [len(row["exact_ratio"]) for row in rows["sparse"]] == [3]
    assert [row["mode"] for row in rows["pipeline"]] == ["auto", "parts", "blocks"]
    assert "blocks resident" in rows["pipeline"][2]["what"]
    assert {row["form"] for row in rows["formats"]} == {"int8", "Q8_0", "Q4_K"}
    candidates = rows["candidates"]
    assert {row["switch"] for row in candidates} == SWITCHES.keys()
    steps = [row for row in candidates if "a step" in row["what"]]
    assert {row["switch"] for row in steps} == SWITCHES.keys() - {"cudnn"}
    assert all(len(row["off_ratio"]) == 3 and row["on_host_ms"] > 0 for row in steps)
    assert all(row["error"] == 0 for row in steps if row["switch"] in ("gguf", "quantise_once"))
    alone = [row for row in candidates if "moved_gb" in row]
    assert len(alone) == 4 and all(row["of_copy"] > 0 for row in alone)
    assert [row["not_here"] for row in candidates if "not_here" in row] == [
        "there is no NVIDIA card"
    ]
    assert sum("differs_in" in row for row in candidates) == len(FORMATS)
    measured = {row["what"] for row in rows["machine"]}
    assert measured >= {"card", "software", "backends", "copy", "products", "attention"}
    assert sum("errors" in row for row in rows["correct"]) >= 12
    assert [row["what"] for row in rows["dynamic"]][-1] == "afterwards"
    assert {row["what"] for row in rows["static"]} == {row["what"] for row in rows["dynamic"]}
    assert any(row.get("reaches_all") for row in rows["static"])


def test_report_has_a_table_for_each_section_and_says_what_it_is_of(tiny):
    _, sections, text = tiny
    assert {*sections} - {*report.TABLES} == set()
    for title, _ in report.TABLES.values():
        assert f"## {title}\n" in text
    assert "--tiny" in text and "checks passed, 0 did not" in text


def test_processes_start_as_their_flags_differ():
    assert [group[0].process for group in processes(NAMES)] == ["resident", "dynamic", "static"]
    assert processes(["vae", "machine"])[0][0].name == "machine"
    assert len(processes(NAMES, tiny=True)) == 1


def options(tmp_path, *names, seconds=60):
    return runner.parse(["--only", *names, "--out", str(tmp_path), "--seconds", str(seconds)])


def run_fake(monkeypatch, tmp_path, behaviour: dict[str, str], seconds=60):
    """Run the check with processes that do what `behaviour` says of a section."""
    script = tmp_path / "process.py"
    script.write_text(
        textwrap.dedent(f"""
            import os, sys, time
            from pathlib import Path
            sys.path.append({str(ROOT)!r})
            from benchmarks.gpu.results import Results
            results = Results(Path({str(tmp_path)!r}))
            for name in sys.argv[1:]:
                results.begin(name)
                results.add(name, {{"what": "a row", "passed": True}})
                exec({behaviour!r}.get(name, ""))
                results.end(name, "done")
            """)
    )
    monkeypatch.setattr(
        runner.Runner, "command", lambda self, names, ends: [sys.executable, str(script), *names]
    )
    return runner.Runner(options(tmp_path, *NAMES[:4], seconds=seconds)).run().content["sections"]


def test_a_process_that_dies_costs_one_section(monkeypatch, tmp_path):
    death = {NAMES[1]: "print('last words'); sys.stdout.flush(); os._exit(7)"}
    sections = run_fake(monkeypatch, tmp_path, death)
    states = [sections[name]["state"] for name in NAMES[:4]]
    assert states == ["done", "failed", "done", "done"]
    assert "last words" in sections[NAMES[1]]["error"]
    assert sections[NAMES[1]]["rows"] == [{"what": "a row", "passed": True}]
    assert "the process ended" in (tmp_path / "GPU.md").read_text()


def test_a_process_that_hangs_is_ended(monkeypatch, tmp_path):
    short = {s.name: s._replace(seconds=1) for s in SECTIONS}
    monkeypatch.setattr(runner, "BY_NAME", short)
    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    pid = tmp_path / "pid"
    hang = f"Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    sections = run_fake(monkeypatch, tmp_path, {NAMES[0]: hang})
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert [sections[name]["state"] for name in NAMES[:4]] == ["failed", *["done"] * 3]


def test_a_process_that_never_starts_ends_the_run(monkeypatch, tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no ComfyUI')"]
    monkeypatch.setattr(runner.Runner, "command", lambda self, names, ends: command)
    sections = runner.Runner(options(tmp_path, *NAMES[:2])).run().content["sections"]
    assert all("no ComfyUI" in sections[name]["error"] for name in NAMES[:2])


def test_nothing_begins_after_the_deadline(monkeypatch, tmp_path):
    sections = run_fake(monkeypatch, tmp_path, {}, seconds=5)
    assert {section["state"] for section in sections.values()} == {"skipped"}


@pytest.fixture
def in_worker(monkeypatch, tmp_path):
    """Run functions as sections of a worker; the sections as they are recorded."""

    def run(*functions, seconds=20, ends=60.0):
        module = types.ModuleType("benchmarks.gpu.tried")
        for index, function in enumerate(functions):
            setattr(module, f"run_tried{index}", function)
        monkeypatch.setitem(sys.modules, "benchmarks.gpu.tried", module)
        instance = worker.Worker(tmp_path, tmp_path, tiny=True)
        for index in range(len(functions)):
            section = Section(f"tried{index}", "tried", "resident", seconds)
            instance.run(section, time.time() + ends)
        return list(Results(tmp_path).content["sections"].values())

    return run


def test_a_section_that_fails_keeps_its_rows(in_worker):
    def fails(instance):
        instance.row(what="first", ms=1.0)
        raise ValueError("no such kernel")

    failed, fine = in_worker(fails, lambda instance: instance.row(what="second"))
    assert failed["state"] == "failed" and "ValueError: no such kernel" in failed["error"]
    assert failed["rows"] == [{"what": "first", "ms": 1.0}]
    assert fine["state"] == "done" and fine["rows"] == [{"what": "second"}]


def test_an_attempt_that_fails_is_a_row(in_worker):
    def tries(instance):
        instance.attempt("a size", lambda: 1 / 0, pixels=512)
        instance.row(what="next")

    (section,) = in_worker(tries)
    first, second = section["rows"]
    assert section["state"] == "done" and second == {"what": "next"}
    assert first["pixels"] == 512 and first["passed"] is False
    assert "ZeroDivisionError" in first["error"]
    assert "a size did not pass" in report.verdicts({"tried": section})


def test_a_section_stops_at_its_limit(in_worker):
    def waits(instance):
        try:
            time.sleep(30)
        except Exception:
            instance.row(what="must not be handled")

    slow, fine = in_worker(waits, lambda instance: instance.row(what="next"), seconds=1)
    assert slow["state"] == "failed" and "1 s" in slow["error"] and slow["rows"] == []
    assert fine["state"] == "done"


def test_no_section_begins_without_time(in_worker):
    (section,) = in_worker(lambda instance: None, ends=5.0)
    assert section["state"] == "skipped"


def test_a_broken_device_ends_the_process(in_worker):
    def breaks(instance):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(SystemExit):
        in_worker(breaks)


def test_numbers_of_another_card_are_dropped(tmp_path):
    results = Results(tmp_path)
    results.content["run"]["card"] = "another"
    results.begin("step")
    worker.Worker(tmp_path, tmp_path, tiny=True).name_card()
    content = Results(tmp_path).content
    assert content["sections"] == {} and content["run"]["card"] != "another"


def test_a_full_run_begins_anew_and_a_part_of_it_keeps_the_rest(tmp_path):
    Results(tmp_path).begin("step")
    runner.Runner(options(tmp_path, "vae"))
    assert Results(tmp_path).state("step") == "running"
    runner.Runner(options(tmp_path, *NAMES))
    assert Results(tmp_path).state("step") is None


def test_operations_of_a_step():
    """101 TFLOP of products and 12 of attention at 1024 px."""
    from krea2_model.config import TransformerConfig

    config, tokens = TransformerConfig(), rooflines.tokens_of(1024, 64)
    assert tokens == 4160
    assert rooflines.product_flops(config, tokens) / 1e12 == pytest.approx(101, rel=0.02)
    assert rooflines.attention_flops(config, tokens) / 1e12 == pytest.approx(12, rel=0.02)
    # Of the model's 25.6 GB, the blocks' matrices.
    assert rooflines.block_bytes(config) / 1e9 == pytest.approx(24.3, rel=0.02)
    attention = {"what": "attention", "tokens": tokens}
    rows = [
        {"what": "copy", "tb_s": 3.0},
        {"what": "products", "form": "bf16", "tokens": tokens, "ms": 5.0},
        attention | {"ms": 2.0},
        attention | {"ms": 1.0},
        attention | {"ms": None},
    ]
    floor = rooflines.step_floor_ms(rooflines.ceilings_from(rows), config, 1024, 64, "Q4_K")
    assert floor == pytest.approx(28 * 6.0 + 28 * 10 * 2 * 4160 * 6144 / 3e9)


def test_no_setting_of_the_card_is_changed():
    sources = "".join(p.read_text() for p in (ROOT / "benchmarks" / "gpu").glob("*.py"))
    names = ("check", "pack", "environment", "tests", "train_nano")
    for scripts in (f"gpu_{name}.sh" for name in names):
        sources += (ROOT / "scripts" / scripts).read_text()
    commands = re.findall(r"nvidia-smi[^\n]*", sources)
    assert any("--query-gpu" in command for command in commands)
    assert not re.search(r"nvidia-smi.* -(pm|pl|lgc|ac|r|c|mig)\b|MallocManaged", sources)
