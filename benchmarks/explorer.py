"""How fast the explorer answers: from a pointer that moves to the picture, in a browser; and fifty clients at once.

    python benchmarks/explorer.py [RUN ...] [--moves 300] [--clients 50]

Needs Chromium. Without a RUN the networks of three recipes are trained on digits for an epoch first: what they have
learned does not change how long they take. The browser, the server and all clients share this machine's cores. A client
opens a connection of its own and asks for one random code after another; all begin together.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Annotated, Any

import httpx2
import numpy as np
import tyro
import uvicorn
from playwright.sync_api import sync_playwright
from tyro.conf import Positional

from vaelab.cli.exploring import _listen
from vaelab.config import override
from vaelab.drawing.scene import scene_of
from vaelab.explorer.server import application
from vaelab.explorer.world import World
from vaelab.recipes import recipe
from vaelab.runs.checkpoint import write_json
from vaelab.runtime import cpu_name
from vaelab.train import fit

HERE = Path(__file__).parent

# One pointer at random places of the map, each as soon as the picture of the one before is there.
MOVES = """async (count) => {
  const map = document.getElementById('map'), picture = document.getElementById('picture');
  const box = map.getBoundingClientRect(), taken = [];
  for (let i = 0; i < count; i++) {
    const painted = new Promise((done) => {
      const watcher = new MutationObserver(() => { watcher.disconnect(); done(performance.now()); });
      watcher.observe(picture, {attributes: true, attributeFilter: ['data-count']});
    });
    const started = performance.now();
    map.dispatchEvent(new PointerEvent('pointermove', {pointerId: 1, pointerType: 'mouse',
      clientX: box.left + box.width * Math.random(), clientY: box.top + box.height * Math.random()}));
    taken.push(await painted - started);
  }
  return taken;
}"""


@dataclass(frozen=True)
class Options:
    """How fast the explorer answers."""

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[RUN ...]")] = ()
    moves: int = 300
    clients: int = 50
    requests: int = 20


def main() -> None:
    """Measure each run, print a table, write benchmarks/results/explorer.json."""
    options = tyro.cli(Options)
    if chromium() is None:
        print("the explorer is not measured: no Chromium is installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = options.runs or tuple(trained(name, Path(folder)) for name in ("mlp-2d", "conv-2d", "conv-beta"))
        rows = [measure(run, options) for run in runs]
    content = {
        "command": " ".join(["python benchmarks/explorer.py", *(run.name for run in options.runs)]),
        "what": f"{options.moves} pointer moves in Chromium, one after another; {options.clients} clients at once, "
        f"each {options.requests} random codes; milliseconds; all on one machine of {os.cpu_count()} cores",
        "machine": cpu_name(), "rows": rows,
    }  # fmt: skip
    write_json(HERE / "results" / "explorer.json", content)


def chromium() -> str | None:
    """The browser, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def trained(name: str, folder: Path) -> Path:
    """A run of a recipe, an epoch long, on digits."""
    fit(override(recipe(name), data="digits", epochs=1), out=folder / name)
    return folder / name


def measure(run: Path, options: Options) -> dict[str, Any]:
    """Pointer to picture, and many clients at once, of one run."""
    listener = _listen(0)
    # Spawned, not forked: a copy of a process that has trained waits for threads that it does not have.
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    server = context.Process(target=serve, args=(run, listener, ready), daemon=True)
    server.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        if not ready.wait(120):
            raise SystemExit(f"the explorer of {run} did not start")
        pointer = in_browser(address, options.moves)
        answers = asyncio.run(at_once(address, options.clients, options.requests))
    finally:
        server.terminate()
        server.join()
    row = {"run": run.name, "pointer_to_picture": spread(pointer), f"{options.clients}_clients": spread(answers)}
    print(run.name, row["pointer_to_picture"], row[f"{options.clients}_clients"], flush=True)
    return row


def serve(run: Path, listener: Any, ready: Event) -> None:
    """The explorer of a run, in a process of its own."""
    app = application(World(scene_of(run)))
    ready.set()
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


def in_browser(address: str, moves: int) -> list[float]:
    """Milliseconds from a pointer's move to its picture."""
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium(), args=arguments) as browser,
    ):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.wait_for_selector("html[data-ready=true]", timeout=60_000)
        page.evaluate(MOVES, 20)  # of which the first ones warm everything up
        return page.evaluate(MOVES, moves)


async def at_once(address: str, clients: int, requests: int) -> list[float]:
    """Milliseconds of each answer to so many clients; a refused or failed one ends the benchmark."""
    async with httpx2.AsyncClient(timeout=60) as client:
        latent = (await client.get(f"{address}/run.json")).json()["latent"]
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(clients, requests, 1, latent)).tolist()
    begin = asyncio.Event()

    async def ask(number: int) -> list[float]:
        async with httpx2.AsyncClient(timeout=60) as client:
            await client.get(f"{address}/run.json")  # connected
            await begin.wait()
            taken: list[float] = []
            for z in codes[number]:
                started = time.perf_counter()
                answer = await client.post(f"{address}/api/decode", json={"z": z})
                taken.append(1e3 * (time.perf_counter() - started))
                answer.raise_for_status()
            return taken

    tasks = [asyncio.create_task(ask(number)) for number in range(clients)]
    await asyncio.sleep(2)
    begin.set()
    return [taken for part in await asyncio.gather(*tasks) for taken in part]


def spread(taken: list[float]) -> dict[str, float]:
    """Median, 95th percentile and the largest."""
    return {"median": round(statistics.median(taken), 1), "p95": round(float(np.percentile(taken, 95)), 1),
            "largest": round(max(taken), 1), "n": len(taken)}  # fmt: skip


if __name__ == "__main__":
    main()
