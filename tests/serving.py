"""Explorers that run while tests look at them."""

import contextlib
import functools
import http.server
import threading
import time

import uvicorn

from vaelab.cli.exploring import _listen
from vaelab.explorer.server import application


@contextlib.contextmanager
def served(world):
    """The address of a world's server, which runs in a thread."""
    listener = _listen(0)
    server = uvicorn.Server(uvicorn.Config(application(world), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def static_host(folder):
    """The address of a plain static host of this folder."""
    handler = functools.partial(_Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(10)
