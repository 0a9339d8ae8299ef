"""The checks of scripts/measure_reliability.py, with a short queue."""

import pytest

from conftest import COMFYUI
from headless import ComfyServer
from reliability import checks
from reliability.jobs import nano_graph, pictures


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("reliability")
    checks.prepare(base)
    with ComfyServer(COMFYUI, base, packs=checks.PACKS, extra_args=["--cpu"]) as running:
        yield running


def test_a_queue_with_cancelled_and_broken_jobs_and_a_kill(server):
    """Killed behind the queue, the server is started again, and its pictures are the same."""
    killed = []
    # Memory settles later than this ends.
    figures = checks.queue(
        server, 10, alone=2, most_growth=float("inf"),
        start_anew=lambda server: killed.append(checks.kill(server)),
    )  # fmt: skip
    assert killed
    for kind in ("8 pictures", "1 cancelled while waiting", "1 cancelled while running",
                 "1 refused", "1 failing"):  # fmt: skip
        assert kind in figures


def test_clients_at_once_get_their_own(server):
    assert checks.clients(server, 3, 2)


def test_replaced_files_are_read_anew(server):
    assert checks.replaced_files(server)


def test_models_folder_that_cannot_be_written(server):
    assert checks.read_only_models(server)


def test_out_of_memory_says_so_and_the_queue_goes_on(server):
    assert checks.out_of_memory(server)


def test_a_loader_that_is_asked_again_is_not_run_again(server):
    """Files are looked at for changes, and read only after one."""
    pictures(server, nano_graph(seed=61, **checks.QUICK))
    again = nano_graph(seed=62, **checks.QUICK)
    prompt_id = server.post(again)
    server.wait(prompt_id, timeout=60)
    ((_, cached),) = [
        message
        for message in server.history(prompt_id)["status"]["messages"]
        if message[0] == "execution_cached"
    ]
    assert {"1", "2", "3"} <= set(cached["nodes"])
