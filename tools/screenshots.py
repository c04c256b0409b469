"""Draw the pictures of the explorer that the documentation shows.

    python tools/screenshots.py RUN [--out docs/images]

Needs Chromium. Writes explorer.png (a desktop), explorer-phone.png and explorer.gif, a pointer on its way over the map.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from serving import served
from test_browser import BROWSERS, stroke_only
from vaelab import figures
from vaelab.drawing import media
from vaelab.drawing.scene import scene_of
from vaelab.explorer.world import World

FRAMES = 40
SHRINK = 0.6
POINTER = (125, 30, 160)
SEVEN = [(0.3, 0.25), (0.68, 0.22), (0.58, 0.5), (0.45, 0.82)]


def main() -> None:
    """Open the explorer of a run, use it a little, and take its pictures."""
    import shutil

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, BROWSERS)))
    with served(World(scene_of(options.run))) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1180}, device_scale_factor=1)
        use(page, address)
        page.screenshot(path=options.out / "explorer.png", full_page=True)
        (options.out / "explorer.gif").write_bytes(film(page))
        phone = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark", device_scale_factor=1)
        use(phone, address)
        phone.evaluate("scrollTo(0, 0)")
        phone.screenshot(path=options.out / "explorer-phone.png")
        browser.close()


def use(page: Page, address: str) -> None:
    """Draw a seven, keep three codes."""
    page.goto(address)
    page.wait_for_selector("html[data-ready=true]")
    for name, digit in (("A", 7), ("B", 1), ("C", 4)):
        page.get_by_role("button", name=f"a typical {digit}").click()
        page.click(f"#keep-{name}")
    stroke_only(page, SEVEN)
    page.mouse.move(1, 1)
    page.wait_for_timeout(600)


def film(page: Page) -> bytes:
    """A pointer that goes round on the map, and what is decoded under it."""
    box, panel = (page.locator(name).bounding_box() for name in ("#map", "#picture-panel"))
    assert box is not None
    assert panel is not None
    clip = {"x": box["x"] - 14, "y": box["y"] - 44, "width": panel["x"] + panel["width"] - box["x"] + 14,
            "height": box["height"] + 60}  # fmt: skip
    frames: list[Image.Image] = []
    for step in range(FRAMES):
        angle = 2 * math.pi * step / FRAMES
        x = box["x"] + box["width"] * (0.5 + 0.33 * math.sin(angle))
        y = box["y"] + box["height"] * (0.5 + 0.3 * math.sin(2 * angle))
        page.mouse.move(x, y)
        page.wait_for_timeout(60)
        with Image.open(io.BytesIO(page.screenshot(clip=clip))) as shot:  # pyright: ignore[reportArgumentType]
            frame = shot.convert("RGB").resize((round(shot.width * SHRINK), round(shot.height * SHRINK)))
        x, y = SHRINK * (x - clip["x"]), SHRINK * (y - clip["y"])
        pointer = Image.new("RGB", (9, 9), POINTER)
        frame.paste(pointer, (round(x) - 4, round(y) - 4))
        frames.append(frame)
    palette = few_colours()
    return media.gif_of([frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames], fps=10)


def few_colours() -> Image.Image:
    """A palette of the classes' colours, whole and mixed with paper, greys and the accent: no point turns grey."""
    classes = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in figures.COLOURS]
    mixed = [tuple(round(share * part + (1 - share) * 255) for part in c) for c in classes for share in (1, 0.75, 0.4)]
    greys = [(level,) * 3 for level in range(0, 256, 9)]
    flat = [part for colour in (*mixed, *greys, (255, 255, 255), POINTER) for part in colour]
    palette = Image.new("P", (1, 1))
    palette.putpalette(flat)
    return palette


if __name__ == "__main__":
    main()
