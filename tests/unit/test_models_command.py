"""`krea2 models`: the right files, what is there, and downloads from a hub on this machine."""

import ast
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from krea2_model import catalogue
from krea2_model.catalogue import card_for, files_for
from krea2_model.cli import fetch
from krea2_model.cli.errors import Failure
from krea2_model.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
ENCODER = "text_encoders/qwen3vl_4b_fp8_scaled.safetensors"
VAE = "vae/qwen_image_vae.safetensors"
TRANSFORMER = "diffusion_models/krea2_turbo_fp8_scaled.safetensors"


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for small files of its own; notes what was asked for."""

    files: dict[str, bytes] = {}
    asked: list[tuple[str, str, str | None]] = []
    cut: dict[str, int] = {}

    def respond(self, has_body):
        name = self.path.partition("/resolve/")[2].partition("/")[2].partition("?")[0]
        asked_range = self.headers.get("Range")
        self.asked.append((self.command, name, asked_range))
        if name not in self.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, start = self.files[name], 0
        if asked_range and has_body:
            start = int(re.match(r"bytes=(\d+)-", asked_range)[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:040x}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if has_body:
            self.wfile.write(body[start : self.cut.pop(name, len(body))])

    def do_GET(self):
        self.respond(True)

    def do_HEAD(self):
        self.respond(False)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    Hub.files = {name: name.encode() * 1000 for name in (ENCODER, VAE, TRANSFORMER)}
    Hub.asked, Hub.cut = [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def krea2(hub, tmp_path):
    """Run the command in a process of its own: the hub's address is read when it is imported."""
    dropped = ("HF_", "PYTHON")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    environment |= {
        "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1",
    }  # fmt: skip

    def run(*words, **extra):
        return subprocess.run(
            [sys.executable, "-m", "krea2_model", "models", *words],
            env=environment | extra, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    return run


def test_what_is_missing_is_fetched_into_its_folders(krea2, tmp_path):
    models = tmp_path / "models"
    (models / "vae").mkdir(parents=True)
    (models / VAE).write_bytes(b"mine")
    words = ("--memory", "16", "--models", str(models), "--fetch")
    refused = krea2(*words)
    assert refused.returncode == 2 and "add --yes" in refused.stderr and not Hub.asked
    done = krea2(*words, "--yes")
    assert done.returncode == 0, done.stderr
    assert (models / TRANSFORMER).read_bytes() == Hub.files[TRANSFORMER]
    assert (models / ENCODER).read_bytes() == Hub.files[ENCODER]
    assert (models / VAE).read_bytes() == b"mine"
    last = done.stdout.splitlines()[-1]
    assert last.startswith("To make a picture: krea2 ")
    assert all(str(models / name) in last for name in (TRANSFORMER, ENCODER, VAE))
    # Nothing is asked for again.
    Hub.asked.clear()
    assert krea2(*words, "--yes").returncode == 0 and not Hub.asked


def test_a_download_that_broke_off_goes_on(krea2, tmp_path):
    models = tmp_path / "models"
    words = ("--memory", "16", "--models", str(models), "--fetch", "--yes")
    Hub.files[TRANSFORMER] = os.urandom(30_000_000)
    Hub.cut[TRANSFORMER] = 25_000_000
    first = krea2(*words)
    assert not (models / TRANSFORMER).exists() or first.returncode == 0
    assert krea2(*words).returncode == 0
    assert (models / TRANSFORMER).read_bytes() == Hub.files[TRANSFORMER]
    ranges = [asked for command, name, asked in Hub.asked if command == "GET" and asked]
    assert ranges and int(re.match(r"bytes=(\d+)-", ranges[0])[1]) > 0


def test_failures_are_one_line(krea2, tmp_path):
    words = ("--memory", "16", "--models", str(tmp_path / "models"), "--fetch", "--yes")
    del Hub.files[ENCODER]
    missing = krea2(*words)
    assert missing.returncode == 1 and "Traceback" not in missing.stderr
    assert "qwen3vl_4b_fp8_scaled.safetensors could not be downloaded" in missing.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
    offline = krea2(*words, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "HF_HUB_OFFLINE is set" in offline.stderr


def test_room_is_checked_first(tmp_path):
    fetch.check_room(tmp_path / "not there", 1)
    with pytest.raises(Failure, match=r"The files have 1000000000\.0 GB and .* free"):
        fetch.check_room(tmp_path / "not there", 10**18)


def test_nothing_is_downloaded_without_room_for_all(tmp_path, capsys, monkeypatch):
    def download(*arguments, **options):
        raise AssertionError("a download began")

    size = SimpleNamespace(size=10**18)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: size)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    words = ["--memory", "16", "--models", str(tmp_path), "--fetch", "--yes"]
    assert main(["models", *words]) == 1
    assert "The files have 3000000000.0 GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "gigabytes, card", [(80, 24), (23.6, 24), (16, 16), (15.4, 16), (12, 12), (8, 8), (4, 8)]
)
def test_the_row_of_the_tables_for_a_card(gigabytes, card):
    assert card_for(gigabytes) == card
    for variant in ("turbo", "raw"):
        files = files_for(card, variant)
        assert all(files.values())
        assert all(f.variant in (variant, None) for f in files["transformer"])


def test_an_answer_without_a_question_is_refused(capsys):
    assert main(["models", "--memory", "24", "--yes"]) == 2
    assert "--yes goes with --fetch" in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_made_by_fetch_alone(tmp_path, capsys):
    assert main(["models", "--memory", "8", "--models", str(tmp_path / "models")]) == 2
    assert "which does not exist" in capsys.readouterr().err


def test_what_is_there_is_said(tmp_path, capsys):
    (tmp_path / "diffusion_models").mkdir()
    (tmp_path / "diffusion_models" / "Krea-2-Turbo-Q4_K_M.gguf").touch()
    assert main(["models", "--memory", "8", "--models", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"  there  {Path('diffusion_models', 'Krea-2-Turbo-Q4_K_M.gguf')}" in lines
    assert not [line for line in lines if "get    diffusion_models" in line]
    assert [line for line in lines if "get    text_encoders/qwen3vl_4b_fp8_scaled" in line]
    assert lines[-1].startswith("To download what is missing: krea2 models --fetch --memory 8")


def test_the_tables_of_the_docs_are_the_catalogue():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    models = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("| ")]
    for file in catalogue.FILES:
        assert file.url in readme, file.name
        for card in file.cards if file.folder == "diffusion_models" else ():
            (row,) = [line for line in rows if line.startswith(f"| {card} GB |")]
            # 6.0 to 7.5 GB and 8.9 to 10.6 GB are of two kinds; 13.1 GB stands where it is first.
            size = file.size if file.size in row else None
            assert size or (file.name.endswith("fp8_scaled.safetensors") and "fp8_scaled" in row)
        if f"({file.url})" in models:
            (row,) = [line for line in models.splitlines() if f"({file.url})" in line]
            assert file.size in row and f"`{file.folder}`" in row


def test_only_fetching_reaches_the_network():
    """SECURITY.md: the nodes never do; the command line and a program where told to fetch."""
    folders = ("krea2_model", "krea2_training", "nodes")
    for file in [file for folder in folders for file in ROOT.glob(f"{folder}/**/*.py")]:
        names = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                is_ours = node.level > 0
                if is_ours and "nodes" in file.relative_to(ROOT).parts and "cli" in parts:
                    # What pictures keep; it imports neither of the two below.
                    assert node.module == "krea2_model.cli.kept", file
                for module, importer in (("fetch", "cli/models.py"), ("hub", "pipeline/parts.py")):
                    if is_ours and module in parts:
                        assert file == ROOT / "krea2_model" / importer
        expected = file in (ROOT / "krea2_model/cli/fetch.py", ROOT / "krea2_model/hub.py")
        assert ("huggingface_hub" in names) == expected, file
        assert ("urllib" in names) == (file == ROOT / "krea2_training/rewards.py"), file


def test_help_and_other_commands_do_not_import_the_hub():
    code = (
        "import sys, json; from krea2_model.cli.main import main\n"
        "main(['models', '--memory', '16', '--models', 'nowhere'])\n"
        "print(json.dumps([n for n in ('torch', 'huggingface_hub') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert json.loads(done.stdout.splitlines()[-1]) == []
