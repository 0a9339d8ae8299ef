"""What ComfyUI's registry asks of the pack, and what its archive holds."""

import re
import tomllib

import pytest
from PIL import Image

from archive import ROOT, archive_files

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = SETTINGS["project"], SETTINGS["tool"]["comfy"]
FILES = archive_files()


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_name_and_version():
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,99}", PROJECT["name"])
    assert "comfyui" not in PROJECT["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
    newest = re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1]
    assert newest == PROJECT["version"]


def test_what_the_registry_shows():
    assert PROJECT["description"] and COMFY["DisplayName"] == "Krea 2 Kit"
    assert [(ROOT / name).is_file() for name in PROJECT["license-files"]] == [True]
    assert PROJECT["license"] == "Apache-2.0" and (ROOT / PROJECT["readme"]).is_file()
    assert re.fullmatch(r">=\d+\.\d+\.\d+", COMFY["requires-comfyui"])
    # Beside WEB_DIRECTORY the page would load its scripts twice.
    assert "web" not in COMFY


def test_requirements_are_told_once_the_same():
    def of(file):
        return [line for line in read(file).splitlines() if not line.startswith("#")]

    assert PROJECT["dependencies"] == of("requirements.txt")
    extras = {name: of(f"requirements-{name}.txt") for name in ("training", "rendering")}
    assert PROJECT["optional-dependencies"] == extras


def test_the_owner_s_fields_are_filled_in_together():
    """The icon's address needs the repository's, and without a publisher neither is used."""
    fields = (PROJECT["urls"].get("Repository", ""), COMFY["PublisherId"], COMFY["Icon"])
    assert all(fields) or not any(fields)
    guide = read("CONTRIBUTING.md").partition("## Publishing")[2]
    for name in ("Repository", "PublisherId", "Icon", "docs/icon.png", "REGISTRY_ACCESS_TOKEN"):
        assert f"`{name}`" in guide
    assert COMFY["Icon"].startswith("https://") or not COMFY["Icon"]


def test_the_icon():
    icon = Image.open(ROOT / "docs" / "icon.png")
    assert icon.format == "PNG" and icon.width == icon.height <= 400
    assert len(set(icon.convert("RGB").resize((16, 16)).get_flattened_data())) > 4


def test_the_archive_has_nothing_that_only_this_repository_needs():
    folders = {name.partition("/")[0] for name in FILES if "/" in name}
    wanted = {"docs", "example_workflows", "krea2_model", "krea2_rendering", "krea2_training"}
    wanted |= {"locales", "nodes", "web"}
    assert folders - {"subgraphs"} == wanted
    assert not [
        name for name in FILES if re.search(r"\.pyc$|^\.|requirements-test|(^|/)test_", name)
    ]


@pytest.mark.parametrize(
    "folder", ["docs", "example_workflows", "krea2_model", "locales", "nodes", "web"]
)
def test_the_archive_has_everything_of(folder):
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.*")}
    here = {name for name in here if "__pycache__" not in name}
    assert here and here <= set(FILES)


def test_workflow_files_use_what_there_is():
    tests, publish = (read(f".github/workflows/{name}.yml") for name in ("test", "publish"))
    assert "run: bash scripts/test.sh" in tests and (ROOT / "scripts" / "test.sh").is_file()
    assert "uses: ./.github/workflows/test.yml" in publish and "workflow_call" in tests
    assert "secrets.REGISTRY_ACCESS_TOKEN" in publish and "pyproject.toml" in publish


def test_pip_installs_all_of_the_package_and_nothing_else():
    tool = SETTINGS["tool"]["setuptools"]
    packages = ("krea2_model", "krea2_training", "krea2_rendering")
    assert tool["packages"]["find"]["include"] == [f"{package}*" for package in packages]
    files = [file for package in packages for file in (ROOT / package).rglob("*.*")]
    folders = {file.parent for file in files if file.suffix == ".py"}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    data = {file for file in files if file.suffix not in (".py", ".pyc")}
    patterns = tool["package-data"]
    assert data == {
        f for name in packages for p in patterns.get(name, ()) for f in (ROOT / name).glob(p)
    }
    assert PROJECT["scripts"] == {"krea2": "krea2_model.cli.main:main"}
