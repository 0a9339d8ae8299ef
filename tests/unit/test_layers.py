"""The layers of krea2_model: networks know no files, images no networks, and nothing a circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import krea2_model

ROOT = Path(krea2_model.__file__).parent
TRAINING = ROOT.parent / "krea2_training"
# Modules that every folder may import, and what each may besides itself.
BELOW_ALL = {"checks", "config", "devices", "replacing"}
PARTS = {"nn", "images", "nano", "transformer", "vae", "text", "checkpoints", "lora"}
MAY_IMPORT = {
    "nn": set(),
    "images": set(),
    "transformer": {"nn", "guidance"},
    "vae": {"nn"},
    "text": {"nn", "images", "nano"},
    "nano": set(),
    "checkpoints": {"nn", "nano", "text", "transformer", "vae"},
    "lora": {"nn", "checkpoints", "guidance", "transformer"},
    "features": {*PARTS, "guidance", "schedule"},
    "memory": {"nn", "transformer", "vae", "text", "checkpoints"},
    "sampling": {"features", "transformer", "extrapolation", "guidance", "schedule"},
    "pipeline": {
        *PARTS,
        "features",
        "memory",
        "guidance",
        "schedule",
        "sampling",
        "hub",
        "diffusers_names",
    },
}
TRAINING_MAY_IMPORT = {
    "settings": set(),
    "engine": {"settings"},
    "data": {"settings", "engine"},
    "weights": {"settings", "engine", "data", "config", "samples"},
}


def imported(file: Path, root: Path = ROOT) -> set[str]:
    """Folders and modules of the package that a file imports, for types only too."""
    tree, here = ast.parse(file.read_text(encoding="utf-8")), file.relative_to(root).parts
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == len(here):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.partition(".")[0] for name in names}
    return found


@pytest.mark.parametrize(
    "root, folder, below",
    [(ROOT, folder, below | BELOW_ALL) for folder, below in MAY_IMPORT.items()]
    + [(TRAINING, folder, below) for folder, below in TRAINING_MAY_IMPORT.items()],
)
def test_a_folder_imports_only_what_is_below_it(root, folder, below):
    files = sorted((root / folder).rglob("*.py")) or [root / f"{folder}.py"]
    for file in files:
        others = imported(file, root) - {folder} - below
        assert not others, f"{file.relative_to(root)} imports {', '.join(sorted(others))}"


def test_the_command_line_is_above_everything():
    files = [file for file in ROOT.rglob("*.py") if file.parent != ROOT / "cli"]
    above = {file.name for file in files if "cli" in imported(file)}
    assert above == {"__main__.py"}


def modules_imported(file: Path, root: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, by their dotted names."""
    here, names = file.relative_to(root).parts[:-1], set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            for alias in node.names:
                name = alias.name
                # A module, a package, or what a module or a package has.
                for parts in ([*base, name], [*base, name, "__init__"], base, [*base, "__init__"]):
                    path = root.joinpath(*filter(None, parts))
                    if path.with_suffix(".py").is_file():
                        names.add(".".join(filter(None, parts)))
                        break
    return names


@pytest.mark.parametrize("root", [ROOT, TRAINING], ids=lambda root: root.name)
def test_no_module_imports_itself_through_others(root):
    files = {".".join(f.relative_to(root).with_suffix("").parts): f for f in root.rglob("*.py")}
    left = {name: modules_imported(file, root) - {name} for name, file in files.items()}
    assert any(left.values())
    while left:
        free = [name for name, imports in left.items() if not imports & left.keys()]
        assert free, f"these import each other: {', '.join(sorted(left))}"
        for name in free:
            del left[name]


def users_of(package: str) -> set[str]:
    """Modules of krea2_model, and folders beside it, whose files name a package."""
    files = [(f, f.relative_to(ROOT).as_posix()) for f in ROOT.rglob("*.py")]
    for folder in ("nodes", "krea2_training", "krea2_rendering"):
        files += [(f, folder) for f in (ROOT.parent / folder).rglob("*.py")]
    return {name for file, name in files if package in file.read_text(encoding="utf-8")}


def test_only_the_command_line_knows_the_rendering():
    """Which needs packages that nodes and training do without."""
    assert users_of("krea2_rendering") == {"cli/rendering.py"}


def test_only_the_command_line_knows_the_training():
    users = {
        file.relative_to(ROOT).as_posix()
        for file in ROOT.rglob("*.py")
        if "krea2_training" in file.read_text(encoding="utf-8")
    }
    assert users == {"cli/train.py"}


def test_nodes_import_the_training_where_it_begins():
    """In one function, so that nothing of it is imported with the nodes."""
    nodes, found = ROOT.parent / "nodes", {}
    for file in nodes.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        inside = {id(n): f.name for f in functions for n in ast.walk(f)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any("krea2_training" in name for name in names):
                found[file.relative_to(nodes).as_posix()] = inside.get(id(node))
    assert found == {"managed/training_package.py": "training"}


def test_settings_of_training_need_no_torch():
    """So that a wrong one is refused at once; nor do processes that read pictures."""
    code = "import sys, krea2_training.config, krea2_training.curate\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TRAINING.parent)
