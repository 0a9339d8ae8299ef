"""A small client for ComfyUI's API, and a headless ComfyUI of one's own.

    client = ComfyClient("127.0.0.1:8188")
    outputs = client.run(graph, on_progress=print)
    [png] = client.images(outputs)

    with ComfyServer("ComfyUI", "base", packs={"comfyui-krea2-kit": ROOT}) as server:
        server.post(graph)  # and all else that a client does

Needs the standard library, and aiohttp, which ComfyUI brings, for progress. Imports neither torch
nor the pack.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user")
# Called with a node's id, how far it is, and its total; 0 of 0 when it begins. ComfyUI leaves out
# steps that follow each other faster than about ten a second, but never the first and the last.
OnProgress = Callable[[str, int, int], None]


class ServerError(RuntimeError):
    """ComfyUI did not start, or ended; the message has the end of its log."""


class JobError(RuntimeError):
    """A graph was refused, failed or was cancelled; `messages` has a line for each reason."""

    def __init__(self, messages: list[str]):
        super().__init__("\n".join(messages))
        self.messages = messages


class ComfyClient:
    """Talks to a ComfyUI that runs at `address`, "127.0.0.1:8188" for example."""

    def __init__(self, address: str):
        self.address = address
        self.client_id = uuid.uuid4().hex
        # A proxy of the environment must not come between us and this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(self, graph: dict, workflow: dict | None = None) -> str:
        """Queue an API graph; its prompt id. Raises JobError with every node's complaint.

        workflow: the page's form of the graph, for the PNG to carry beside it.
        """
        body: dict = {"prompt": graph, "client_id": self.client_id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        status, reply = self._send("/prompt", body)
        # With several outputs, ComfyUI refuses one and runs the others: here that is an error too.
        if status == 200 and reply.get("node_errors"):
            self.cancel(reply["prompt_id"])
        if status != 200 or reply.get("node_errors"):
            raise JobError(refusal_messages(reply))
        return reply["prompt_id"]

    def run(
        self,
        graph: dict,
        on_progress: OnProgress | None = None,
        timeout: float | None = None,
        workflow: dict | None = None,
    ) -> dict:
        """`post` and `wait` in one, which hears of a short job's progress too."""
        return self._outputs(lambda: self.post(graph, workflow), on_progress, timeout)

    def wait(
        self, prompt_id: str, on_progress: OnProgress | None = None, timeout: float | None = None
    ) -> dict:
        """The outputs by node id, when the job is done. Raises JobError, or TimeoutError after
        `timeout` seconds (the job goes on)."""
        if not self._is_pending(prompt_id):
            return self._finished(prompt_id)
        return self._outputs(lambda: prompt_id, on_progress, timeout)

    def _outputs(
        self, begin: Callable[[], str], on_progress: OnProgress | None, timeout: float | None
    ) -> dict:
        follow = self._follow(begin, on_progress or (lambda *_: None))
        return self._finished(asyncio.run(asyncio.wait_for(follow, timeout)))

    def _finished(self, prompt_id: str) -> dict:
        entry = self.history(prompt_id)
        messages = failure_messages(entry)
        if messages:
            raise JobError(messages)
        return entry["outputs"]

    def images(self, outputs: dict) -> list[bytes]:
        """The image files that `wait` returned, in order."""
        found = [image for output in outputs.values() for image in output.get("images", ())]
        return [self.request("/view?" + urllib.parse.urlencode(image)) for image in found]

    def upload(self, name: str, content: bytes) -> str:
        """Put an image file into ComfyUI's input folder; the name that Load Image takes.

        Not `name` where another image has that already.
        """
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"'
        body = f"{head}\r\n\r\n".encode() + content + f"\r\n--{boundary}--\r\n".encode()
        status, reply = self._send(
            "/upload/image", body, f"multipart/form-data; boundary={boundary}"
        )
        if status != 200:
            raise RuntimeError(f"The upload of {name} was answered {status}: {reply!r}")
        return reply["name"]

    def history(self, prompt_id: str) -> dict:
        """What ComfyUI remembers of a finished job; empty where there is none."""
        return self.request(f"/history/{prompt_id}").get(prompt_id, {})

    def job(self, prompt_id: str) -> dict:
        """How a job stands, "status" above all; empty for one that was cancelled while waiting."""
        status, job = self._send(f"/api/jobs/{prompt_id}")
        return {} if status == 404 else job

    def interrupt(self) -> None:
        """Stop the running job."""
        self.request("/interrupt", {})

    def cancel(self, prompt_id: str) -> bool:
        """Stop or unqueue a job; whether there was one."""
        return self.request(f"/api/jobs/{prompt_id}/cancel", {})["cancelled"]

    def object_info(self, node: str) -> dict:
        """A node's description; empty where ComfyUI does not know it."""
        return self.request(f"/object_info/{urllib.parse.quote(node)}").get(node, {})

    def options(self, node: str, name: str) -> list[str]:
        """What a combo input offers."""
        inputs = self.object_info(node)["input"]
        kind, *settings = {**inputs.get("required", {}), **inputs.get("optional", {})}[name]
        return kind if isinstance(kind, list) else settings[0]["options"]

    def request(self, path: str, body: dict | None = None) -> Any:
        """GET, or POST where there is a body: decoded JSON, or bytes where it is none. Raises
        RuntimeError for a status other than 200."""
        status, reply = self._send(path, body)
        if status != 200:
            raise RuntimeError(f"{path} answered {status}: {reply!r}")
        return reply

    def _send(
        self, path: str, body: dict | bytes | None = None, content_type: str = "application/json"
    ) -> tuple[int, Any]:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        request = urllib.request.Request(f"http://{self.address}{path}", data)
        request.add_header("Content-Type", content_type)
        try:
            response = self._opener.open(request, timeout=60)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            content = response.read()
            if response.headers.get_content_type() == "application/json":
                content = json.loads(content)
            return response.status, content

    async def _follow(self, begin: Callable[[], str], on_progress: OnProgress) -> str:
        """Report progress until the job that `begin` names is over; its prompt id.

        ComfyUI keeps no messages for who is not there: the connection comes first.
        """
        import aiohttp

        url = f"http://{self.address}/ws?clientId={self.client_id}"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(url, max_msg_size=0) as connection,
        ):
            prompt_id, over = begin(), False
            while not over:
                message = None
                with suppress(TimeoutError):
                    message = await connection.receive(timeout=1)
                if message is not None and message.type == aiohttp.WSMsgType.TEXT:
                    over = report(json.loads(message.data), prompt_id, on_progress)
                elif message is None or connection.closed:
                    # What was said before this connection, or after, has to be asked for.
                    over = not self._is_pending(prompt_id)
        return prompt_id

    def _is_pending(self, prompt_id: str) -> bool:
        job = self.job(prompt_id)
        if not job:
            raise JobError([f"Job {prompt_id} is not known: it was cancelled before it began."])
        return job["status"] in ("pending", "in_progress")


class ComfyServer(ComfyClient):
    """A ComfyUI process of its own on a free port; a context manager.

    comfyui: ComfyUI's folder, which is only read. base: where it keeps models, outputs and
    settings, made if missing. packs: custom nodes to link into it, by folder name. extra_args: for
    ComfyUI's command line, such as "--cpu". log: what ComfyUI prints, by default in `base`.
    """

    def __init__(
        self,
        comfyui: str | Path,
        base: str | Path,
        *,
        python: str = sys.executable,
        packs: Mapping[str, Path] | None = None,
        extra_args: Iterable[str] = (),
        log: Path | None = None,
        start_seconds: float = 300,
    ):
        super().__init__("")  # The port is chosen at the start.
        self.comfyui = Path(comfyui).resolve()
        self.base = Path(base).resolve()
        self.python = python
        self.packs = dict(packs or {})
        self.extra_args = list(extra_args)
        self.log = log or self.base / "comfyui.log"
        self.start_seconds = start_seconds
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process and wait until it answers. Raises ServerError."""
        self._make_base()
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        command = [self.python, str(self.comfyui / "main.py")]
        command += ["--listen", "127.0.0.1", "--port", str(port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", "--disable-auto-launch", *self.extra_args]
        try:
            with self.log.open("wb") as log:
                # A session of its own: Ctrl-C in the terminal reaches us, and we stop it in order.
                self._process = subprocess.Popen(
                    command,
                    cwd=self.base,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process and its children, by force if need be."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(10)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def pid(self) -> int:
        """The running process."""
        if self._process is None:
            raise ServerError("ComfyUI is not running.")
        return self._process.pid

    def kill(self) -> None:
        """End the process without a warning, as a power cut would."""
        os.killpg(self.pid, signal.SIGKILL)
        self.stop()

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _send(self, path: str, *arguments, **options) -> tuple[int, Any]:
        try:
            return super()._send(path, *arguments, **options)
        except OSError:
            self._check_alive()
            raise

    def _check_alive(self) -> None:
        """Raises ServerError if the process has ended, or does within half a second."""
        code: int | str = "no process"
        if self._process:
            try:
                # A connection breaks a little before the process is gone.
                code = self._process.wait(0.5)
            except subprocess.TimeoutExpired:
                return
        raise ServerError(f"ComfyUI ended ({code}). Its log ends:\n{self.log_tail()}")

    def _make_base(self) -> None:
        for name in FOLDERS:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, pack in self.packs.items():
            link = self.base / "custom_nodes" / name
            if link.resolve() != Path(pack).resolve():
                link.unlink(missing_ok=True)
                link.symlink_to(Path(pack).resolve(), target_is_directory=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            # Each try takes half a second where nothing answers yet.
            with suppress(OSError):
                self._send("/system_stats")
                return
        raise ServerError(
            f"ComfyUI does not answer after {self.start_seconds:g} s. Its log ends:\n"
            + self.log_tail()
        )


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def report(message: dict, prompt_id: str, on_progress: OnProgress) -> bool:
    """Pass a message of the websocket on; whether it says that the job is over."""
    data = message.get("data", {})
    # A client that connects late is told the running node without the job's id.
    if data.get("prompt_id", prompt_id) != prompt_id:
        return False
    if message["type"] == "executing":
        if data["node"] is None:
            return True
        on_progress(data["node"], 0, 0)
    elif message["type"] == "progress":
        on_progress(data["node"], int(data["value"]), int(data["max"]))
    return False


def refusal_messages(reply: dict) -> list[str]:
    """Why a graph was not queued, a line for each reason."""
    messages = []
    for node, problem in dict(reply.get("node_errors") or {}).items():
        for error in problem["errors"]:
            reason = ": ".join(filter(None, (error["message"], error["details"])))
            if error["type"] == "custom_validation_failed":
                # Said once for each input that the node's check looks at.
                reason = error["details"].partition(" - ")[2]
            messages.append(f"{problem['class_type']} (node {node}): {reason}")
    messages = list(dict.fromkeys(messages))
    if not messages:
        error = reply.get("error", reply)
        messages = [error["message"] if isinstance(error, dict) else str(error)]
    return messages


def failure_messages(entry: dict) -> list[str]:
    """What stopped a finished job; empty where nothing did."""
    messages = []
    for kind, data in entry.get("status", {}).get("messages", ()):
        if kind == "execution_error":
            reason = data["exception_message"].strip()
            messages.append(f"{data['node_type']} (node {data['node_id']}): {reason}")
        elif kind == "execution_interrupted":
            messages.append(f"{data['node_type']} (node {data['node_id']}): interrupted")
    return messages
