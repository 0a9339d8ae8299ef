"""Running ComfyUI servers: graphs to the least loaded, pictures back, none lost with a server.

This module alone reaches the network, at the addresses that the user names.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from typing import Any

from krea2_model.cli.errors import UsageError

from .comfy_graph import Graph

# Jobs of ours in a server's queue: one runs, one waits.
DEPTH = 2
# A job goes to so many servers before it is an error.
_TRIES = 4
_TIMEOUT, _QUEUE_TIMEOUT = 60, 5  # seconds
_LEAST_POLL, _MOST_POLL = 0.1, 1.0
_LOAD_SECONDS = 1.0
_LEAST_REST, _MOST_REST = 5.0, 300.0


class JobError(Exception):
    """A graph was refused or failed: the job's own fault, on any server."""


class ServerError(Exception):
    """A server does not answer, or has lost the job."""


@dataclass
class Server:
    """A server and what is known of its load. others: jobs of others in its queue."""

    address: str
    ours: int = 0
    others: int = 0
    asked_at: float = 0.0
    failures: int = 0
    rests_until: float = 0.0
    client_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def load(self) -> int:
        return self.ours + self.others

    def paint(self, graph: Graph, stopped: threading.Event) -> list[bytes]:
        """The image files that a graph gives. Raises JobError, or ServerError."""
        status, reply = self._send("/prompt", {"prompt": graph, "client_id": self.client_id})
        if status != 200 or reply.get("node_errors"):
            raise JobError(_refusal(reply))
        job, wait = reply["prompt_id"], _LEAST_POLL
        while not (entry := self._get(f"/history/{job}").get(job)):
            if stopped.wait(wait):
                self._send("/queue", {"delete": [job]})
                raise ServerError("stopped")
            wait = min(_MOST_POLL, wait * 1.2)
            if wait == _MOST_POLL and not self._is_known(job):
                raise ServerError("the server has lost the job")
        if message := _failure(entry):
            raise JobError(message)
        images = [i for out in entry["outputs"].values() for i in out.get("images", ())]
        # What is saved, rather than what is only shown.
        images = [i for i in images if i.get("type") == "output"] or images
        if not images:
            raise JobError("The workflow gave no image; expected a node such as Save Image.")
        found = [self._request("/view?" + urllib.parse.urlencode(image))[1] for image in images]
        self._send("/history", {"delete": [job]})
        return found

    def ask_load(self) -> None:
        """Count the jobs of others. Raises ServerError where there is no answer."""
        queue = self._get("/queue")
        every = len(queue["queue_running"]) + len(queue["queue_pending"])
        self.others, self.asked_at = max(0, every - self.ours), time.monotonic()

    def _is_known(self, job: str) -> bool:
        queue = self._get("/queue")
        waiting = [entry[1] for entry in queue["queue_running"] + queue["queue_pending"]]
        return job in waiting or job in self._get(f"/history/{job}")

    def _get(self, path: str) -> Any:
        timeout = _QUEUE_TIMEOUT if path == "/queue" else _TIMEOUT
        return self._send(path, timeout=timeout)[1]

    def _send(
        self, path: str, body: dict | None = None, timeout: float = _TIMEOUT
    ) -> tuple[int, Any]:
        """The status of an answer below 500, and its JSON."""
        status, content = self._request(path, body, timeout)
        try:
            return status, json.loads(content or b"{}")
        except ValueError:
            raise ServerError(f"{self.address}{path} answers no JSON") from None

    def _request(
        self, path: str, body: dict | None = None, timeout: float = _TIMEOUT
    ) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}{path}", data, headers)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise ServerError(f"{self.address}{path} answers {error.code}") from error
            return error.code, error.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(f"{self.address} does not answer: {reason}") from error


class Servers:
    """Servers that take jobs in turns, the least loaded first.

    Raises UsageError where one is no ComfyUI that answers.
    """

    def __init__(self, addresses: list[str]):
        self._servers = [Server(_address(address)) for address in addresses]
        self._free = threading.Condition()
        self.stopped = threading.Event()
        for server in self._servers:
            try:
                server.ask_load()
            except (ServerError, KeyError, TypeError) as error:
                raise UsageError(
                    f"--server {server.address} is no ComfyUI that answers ({error}). Start it "
                    "(python main.py --listen), and check the address."
                ) from error

    @property
    def slots(self) -> int:
        """Jobs that can be under way at once."""
        return DEPTH * len(self._servers)

    def paint(self, graph: Graph) -> tuple[list[bytes], str]:
        """The image files of a graph, and the server that made them.

        A job whose server ends goes to another. Raises JobError.
        """
        said = ""
        for _ in range(_TRIES):
            server = self._take()
            try:
                found = server.paint(graph, self.stopped)
            except ServerError as error:
                said = str(error)
                self._give_back(server, has_failed=True)
                if self.stopped.is_set():
                    break
            except BaseException:
                self._give_back(server)
                raise
            else:
                self._give_back(server)
                return found, server.address
        raise JobError(f"{_TRIES} servers did not make it: {said}. Add --resume later.")

    def _take(self) -> Server:
        with self._free:
            while not self.stopped.is_set():
                now = time.monotonic()
                awake = [s for s in self._servers if s.rests_until <= now]
                for server in awake:
                    if now - server.asked_at > _LOAD_SECONDS:
                        try:
                            server.ask_load()
                        except ServerError:
                            self._rest(server)
                awake = [s for s in awake if s.rests_until <= now]
                # Behind many jobs of others it would take longer than the wait for a free one.
                most = min((s.load for s in awake), default=0) + DEPTH
                able = [s for s in awake if s.ours < DEPTH and s.load <= most]
                if able:
                    server = min(able, key=lambda s: s.load)
                    server.ours += 1
                    return server
                self._free.wait(_LOAD_SECONDS)
        raise JobError("The run was stopped.")

    def _give_back(self, server: Server, has_failed: bool = False) -> None:
        with self._free:
            server.ours -= 1
            if has_failed:
                self._rest(server)
            else:
                server.failures = 0
            self._free.notify_all()

    @staticmethod
    def _rest(server: Server) -> None:
        """Leave a server alone that does not answer, longer each time."""
        server.failures += 1
        rest = min(_MOST_REST, _LEAST_REST * 2 ** (server.failures - 1))
        server.rests_until = time.monotonic() + rest


def _address(text: str) -> str:
    address = text if "://" in text else f"http://{text}"
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"--server is {text}; expected HOST:PORT, or an http or https address.")
    return address.rstrip("/")


def _refusal(reply: Any) -> str:
    """Why a graph was not queued."""
    messages = [
        f"{problem['class_type']} (node {node}): {error['message']} {error['details']}".strip()
        for node, problem in dict(reply.get("node_errors") or {}).items()
        for error in problem["errors"]
    ]
    error = reply.get("error", reply)
    return "; ".join(dict.fromkeys(messages)) or str(
        error.get("message", error) if isinstance(error, dict) else error
    )


def _failure(entry: dict[str, Any]) -> str:
    """What stopped a job, empty where nothing did."""
    for kind, data in entry.get("status", {}).get("messages", ()):
        if kind == "execution_error":
            return f"{data['node_type']} (node {data['node_id']}): {data['exception_message']}"
        if kind == "execution_interrupted":
            return f"{data['node_type']} (node {data['node_id']}): interrupted"
    return ""
