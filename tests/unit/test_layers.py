"""The layers of krea2_model: networks know no files, pictures no networks, files no LoRAs."""

import ast
from pathlib import Path

import pytest

import krea2_model

ROOT = Path(krea2_model.__file__).parent
# Besides itself and config.py.
MAY_IMPORT = {
    "nn": set(),
    "images": set(),
    "transformer": {"nn", "guidance"},
    "vae": {"nn"},
    "text": {"nn", "images", "nano"},
    "nano": set(),
    "checkpoints": {"nn", "nano", "text", "transformer", "vae"},
    "lora": {"nn", "checkpoints"},
}


def imported(file: Path) -> set[str]:
    """Folders and modules of the package that a file imports, for types only too."""
    tree, here = ast.parse(file.read_text(encoding="utf-8")), file.relative_to(ROOT).parts
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == len(here):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.partition(".")[0] for name in names}
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_from_lower_ones(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        others = imported(file) - {folder, "config"} - MAY_IMPORT[folder]
        assert not others, f"{file.relative_to(ROOT)} imports {', '.join(sorted(others))}"
