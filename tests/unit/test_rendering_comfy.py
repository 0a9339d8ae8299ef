"""A table through ComfyUI servers: columns are inputs, the least loaded is asked, none is lost."""

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from krea2_model.cli.errors import UsageError
from krea2_rendering import comfy_servers
from krea2_rendering.comfy_graph import Template, read_graph

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "tests" / "workflows" / "krea2_nano_first_image.json"


class Comfy:
    """Stands in for a ComfyUI: makes a picture whose colour is the seed, after `seconds`."""

    def __init__(self, seconds=0.0, others=0):
        self.seconds, self.others = seconds, others
        self.graphs, self.history, self.most = [], {}, 0
        self.dies_after = None
        comfy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                comfy.answer(self, None)

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                comfy.answer(self, json.loads(self.rfile.read(length)))

            def log_message(self, *words):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def answer(self, request, body):
        status, reply = self._reply(request.path.partition("?")[0], body, request.path)
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _reply(self, path, body, whole):
        if self.dies_after is not None and len(self.graphs) > self.dies_after:
            return 502, {}
        if path == "/queue":
            waiting = [[0, str(n)] for n in range(len(self.graphs)) if str(n) not in self.done()]
            self.most = max(self.most, len(waiting))
            foreign = [[0, "foreign"]] * self.others
            return 200, {"queue_running": foreign, "queue_pending": waiting}
        if path == "/prompt":
            graph = body["prompt"]
            if graph["2"]["inputs"]["prompt"] == "refused":
                error = {"message": "Bad", "details": "prompt"}
                problem = {"class_type": "K2TextEncode", "errors": [error]}
                return 400, {"node_errors": {"2": problem}}
            self.graphs.append((time.monotonic(), graph))
            return 200, {"prompt_id": str(len(self.graphs) - 1)}
        if path.startswith("/history/"):
            return 200, self.done()
        if path == "/view":
            seed = int(whole.partition("filename=")[2].partition("&")[0])
            stored = io.BytesIO()
            Image.new("RGB", (8, 8), (seed, 0, 0)).save(stored, "PNG")
            return 200, stored.getvalue()
        return 200, b""

    def done(self):
        found = {}
        for number, (begun, graph) in enumerate(self.graphs):
            if time.monotonic() - begun < self.seconds:
                continue
            seed = graph["4"]["inputs"]["seed"]
            messages = []
            if graph["2"]["inputs"]["prompt"] == "fails":
                error = {"node_type": "K2Sampler", "node_id": "4", "exception_message": "no"}
                messages = [["execution_error", error]]
            image = {"filename": str(seed), "type": "output"}
            outputs = {"6": {"images": [image]}}
            found[str(number)] = {"outputs": outputs, "status": {"messages": messages}}
        return found

    def close(self):
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def comfy():
    servers = []

    def start(**options):
        servers.append(Comfy(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def render(krea2, tmp_path):
    def run(rows, *servers, words=(), code=0):
        table = tmp_path / "rows.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = ["render", table, "--engine", "comfyui", "--workflow", WORKFLOW]
        for server in servers:
            command += ["--server", server.address]
        return krea2(*command, "--output", tmp_path / "out", *words, code=code)

    return run


def table(folder):
    rows = pq.read_table(folder / "out" / "table.parquet").to_pylist()
    return {row["row"]: row for row in rows}


def test_rows_fill_the_graph_and_pictures_come_back(render, comfy, tmp_path):
    server = comfy()
    rows = [{"prompt": "a star", "seed": 9, "K2EmptyLatent.width": "256", "id": "x"}]
    rows += [{"prompt": "a ring", "4.seed": 7, "output": "ring.png"}, {"prompt": "a", "sed": 1}]
    assert "1 of 3 pictures" in render(rows, server, code=1)
    seeds = sorted(graph["4"]["inputs"]["seed"] for _, graph in server.graphs)
    widths = {graph["3"]["inputs"]["width"] for _, graph in server.graphs}
    assert seeds == [7, 9] and widths == {256, 128}
    found = table(tmp_path)
    assert Image.open(tmp_path / "out" / found[1]["file"]).getpixel((0, 0)) == (9, 0, 0)
    assert (found[1]["id"], found[2]["file"], found[2]["width"]) == ("x", "ring.png", 8)
    assert "Did you mean seed?" in found[3]["error"]
    # Only what is missing is made again.
    rows[2] = {"prompt": "a"}
    render(rows, server, words=["--resume"])
    assert len(server.graphs) == 3


def test_errors_of_jobs_are_rows(render, comfy, tmp_path):
    server = comfy()
    error = render([{"prompt": p} for p in ("refused", "fails", "a star")], server, code=1)
    assert "2 of 3 pictures not made" in error
    found = table(tmp_path)
    assert found[1]["error"] == "K2TextEncode (node 2): Bad prompt"
    assert found[2]["error"] == "K2Sampler (node 4): no" and found[3]["file"]


def test_the_least_loaded_server_is_asked_and_none_is_flooded(render, comfy):
    servers = [comfy(seconds=0.05, others=others) for others in (50, 0, 1)]
    render([{"prompt": "a", "seed": n} for n in range(12)], *servers)
    busy, *free = (len(server.graphs) for server in servers)
    assert busy == 0 and min(free) > 1 and sum(free) == 12
    assert max(server.most for server in servers) <= comfy_servers.DEPTH


def test_jobs_of_a_server_that_ends_go_to_another(render, comfy, tmp_path, monkeypatch):
    monkeypatch.setattr(comfy_servers, "_LEAST_REST", 0.2)
    ends, stays = comfy(), comfy(seconds=0.05)
    ends.dies_after = 2
    render([{"prompt": "a", "seed": n} for n in range(10)], ends, stays)
    assert len(table(tmp_path)) == 10 and len(list((tmp_path / "out").rglob("*.png"))) == 10


def test_what_is_wrong_is_refused_first(render, comfy, tmp_path):
    server, rows = comfy(), [{"prompt": "a"}]
    assert "needs --workflow FILE and --server" in render(rows, code=2)
    assert "goes with --engine ray" in render(rows, server, words=["--layout", "parquet"], code=2)
    server.close()
    assert "is no ComfyUI that answers" in render(rows, server, code=2)
    page = ROOT / "example_workflows" / "krea2_nano_first_image.json"
    with pytest.raises(UsageError, match="the page's form of a workflow"):
        read_graph(page)
    template = Template(read_graph(WORKFLOW))
    with pytest.raises(UsageError, match="The column clip is no input"):
        template.check_columns(["clip"])
    with pytest.raises(UsageError, match="4.seed is 'x'; expected a int"):
        template.fill({"4.seed": "x"})
    graph = read_graph(WORKFLOW) | {"9": {"class_type": "Other", "inputs": {"seed": 1}}}
    with pytest.raises(UsageError, match="seed may be any of 4.seed, 9.seed"):
        Template(graph).fill({"seed": 1})
    assert Template(graph).fill({"Other.seed": "3"})["9"]["inputs"]["seed"] == 3
