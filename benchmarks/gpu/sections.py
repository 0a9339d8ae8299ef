"""The sections of the check, in the order of their worth, each with the most seconds it may take.

Consecutive sections with the same process share one: it makes the weights once and hands the same
storage to all who are compared. The others start ComfyUI as its users do, which --gpu-only is not.
"""

from __future__ import annotations

from typing import NamedTuple

RESIDENT, DYNAMIC, STATIC = "resident", "dynamic", "static"

# ComfyUI's command line flags of a process.
FLAGS: dict[str, tuple[str, ...]] = {
    RESIDENT: ("--gpu-only",),
    DYNAMIC: (),
    STATIC: ("--disable-dynamic-vram",),
}


class Section(NamedTuple):
    """A part of the check: `module` has the function `run_<name>` that is given a Worker."""

    name: str
    module: str
    process: str
    seconds: int


SECTIONS = (
    Section("machine", "machine", RESIDENT, 40),
    Section("correct", "correct", RESIDENT, 80),
    Section("kernels", "correct", RESIDENT, 20),
    Section("training", "correct", RESIDENT, 40),
    Section("nano", "nano", RESIDENT, 50),
    Section("step", "steps", RESIDENT, 100),
    Section("fp8", "steps", RESIDENT, 45),
    Section("sparse", "sparse", RESIDENT, 30),
    Section("images", "images", RESIDENT, 60),
    Section("candidates", "candidates", RESIDENT, 60),
    Section("pipeline", "pipeline", RESIDENT, 60),
    Section("vae", "parts", RESIDENT, 30),
    Section("encoder", "parts", RESIDENT, 30),
    Section("formats", "steps", RESIDENT, 45),
    Section("compile", "compiling", RESIDENT, 50),
    Section("dynamic", "managed", DYNAMIC, 75),
    Section("static", "managed", STATIC, 75),
)
BY_NAME = {section.name: section for section in SECTIONS}

# All of it, and what sections of later processes are sure to get of that.
DEADLINE_S = 450
RESERVED_S = {DYNAMIC: 40, STATIC: 40}
# A section is not begun with less left.
LEAST_S = 12


def flags_of(section: Section, tiny: bool) -> tuple[str, ...]:
    return ("--cpu",) if tiny else FLAGS[section.process]


def processes(names: list[str], tiny: bool = False) -> list[list[Section]]:
    """The sections by name in their order, those with the same flags in one process."""
    groups: list[list[Section]] = []
    for section in SECTIONS:
        if section.name not in names:
            continue
        if not groups or flags_of(groups[-1][0], tiny) != flags_of(section, tiny):
            groups.append([])
        groups[-1].append(section)
    return groups
