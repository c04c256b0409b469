"""``vaelab explore``."""

from __future__ import annotations

import importlib.util
import shlex
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vaelab.cli.common import RunPath, at_least
from vaelab.errors import UsageError

if TYPE_CHECKING:
    from vaelab.explorer.static import Runtime
    from vaelab.figures import How


def explore(
    run: RunPath,
    /,
    map: Literal["auto", "own", "pca", "tsne", "umap"] = "auto",
    images: int = 2000,
    port: int | None = None,
    open: bool = False,
    static: Path | None = None,
    runtime: Literal["auto", "npm", "cdn"] | None = None,
) -> None:
    """Explore a run's latent space in the browser: map, sliders, drawings, interpolation, arithmetic, samples.

    Serves a page on this machine alone (127.0.0.1) until Ctrl-C, and writes nothing; or, with --static, writes it as
    files for any static host, the model in ONNX.

    Args:
        map: how test images get on the map: their own two dimensions, PCA, t-SNE or UMAP; auto: own or PCA.
        images: test images on the map, at most.
        port: where the page is served (default: 8642); 0: any that is free.
        open: open it in the browser.
        static: a new folder to write the page into, instead of serving it.
        runtime: of a static page, where onnxruntime-web comes from: its npm package, now, or a public address, when the
            page is opened; auto (the default): npm where it is installed.
    """
    at_least(3, images=images)
    at_least(0, most=65535, port=port)
    if static is None and runtime is not None:
        raise UsageError(f"--runtime {runtime} is of a page that is written: give --static, or leave it out")
    if static is not None and (port is not None or open):
        flag = "--open" if port is None else f"--port {port}"
        raise UsageError(f"{flag} is of a page that is served, and --static {static} writes one: leave one out")
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"exploring needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if static is not None:
        _write(run, map, images, static, runtime or "auto")
    else:
        _serve(run, map, images, 8642 if port is None else port, open)


def _serve(run: Path, map: How, images: int, port: int, open: bool) -> None:
    import uvicorn

    from vaelab.drawing.scene import scene_of
    from vaelab.explorer.server import application
    from vaelab.explorer.world import World

    listener = _listen(port)
    with listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        app = application(World(scene_of(run), map, images))
        print(f"{url} explores {run}; Ctrl-C ends it", flush=True)
        if open:
            import webbrowser

            webbrowser.open(url)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
        server.run(sockets=[listener])


def _listen(port: int) -> socket.socket:
    """A socket that only this machine reaches, taken before the model is loaded: a busy port is told at once."""
    # The protocol by name: asyncio sends small answers at once only on sockets that say so, else 40 ms later.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UsageError(f"--port {port} cannot be used ({error.strerror}): choose another, or 0 for any") from error
    return listener


def _write(run: Path, map: How, images: int, out: Path, runtime: Runtime) -> None:
    from vaelab.cli.shipping import description
    from vaelab.drawing.scene import scene_of
    from vaelab.explorer.static import write_static
    from vaelab.explorer.world import World
    from vaelab.runs.folder import RunFolder

    about = description(run, RunFolder.open(run).config())
    files = write_static(World(scene_of(run), map, images), out, runtime, about)
    size = sum((out / name).stat().st_size for name in files) / 2**20
    look = f"python -m http.server --bind 127.0.0.1 --directory {shlex.quote(str(out))}"
    print(f"{out}: {len(files)} files, {size:.1f} MiB; put them on any static host "
          f"(to look at them here: {look})")  # fmt: skip
