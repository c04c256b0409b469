"""The explorer in a real browser: by pointer, keyboard and touch, served and static. Needs Chromium; skips without."""

import io
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from serving import served, static_host
from vaelab import figures
from vaelab.cli import main
from vaelab.drawing.scene import scene_of
from vaelab.errors import FailureError
from vaelab.explorer import static
from vaelab.explorer.world import World

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PIXELS = """(canvas) => { const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    return [canvas.height, canvas.width, Array.from(data)]; }"""


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        # Root may not use Chromium's sandbox; the page is ours.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        with playwright.chromium.launch(executable_path=found, args=arguments) as browser:
            yield browser


def trained(folder, *arguments):
    assert main(["train", *arguments, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model of more dimensions than are shown at first, on a PCA map."""
    folder = tmp_path_factory.mktemp("wide")
    run = trained(folder, "mlp", "--data", "digits", "--epochs", "15", "--batch-size", "32")
    return World(scene_of(run))


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    """A model of two dimensions."""
    return World(scene_of(trained(tmp_path_factory.mktemp("plane"), "mlp-2d", "--data", "digits", "--epochs", "4")))


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """A model of colour images of another size, without classes."""
    folder = tmp_path_factory.mktemp("colour")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        shade = rng.integers(0, 255, 3, np.uint8)
        Image.fromarray(np.broadcast_to(shade, (24, 16, 3)).copy()).save(folder / "photos" / f"{i}.png")
    run = trained(folder, "conv-2d", "--data", str(folder / "photos"), "--epochs", "2", "--batch-size", "16")
    return World(scene_of(run))


@pytest.fixture(scope="module")
def address(wide):
    with served(wide) as address:
        yield address


@pytest.fixture
def opened(browser):
    """Opens a page, ready to be used; at the end nothing may have been said on its console."""
    contexts, said = [], []

    def open_(address, *, ready=True, **options):
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "accept_downloads": True, **options}
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        if ready:
            page.wait_for_selector("html[data-ready=true]")
        return page

    open_.said = said
    yield open_
    for context in contexts:
        context.close()
    # Reading canvases is what these tests do, not the page.
    assert [text for text in said if "willReadFrequently" not in text] == []


@pytest.fixture
def page(opened, address):
    return opened(address)


def pixels(page, selector):
    """What a canvas shows, (H, W) of its red channel or (H, W, 3)."""
    height, width, data = page.locator(selector).evaluate(PIXELS)
    return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]


def settled(page):
    """Waits until no picture is on its way."""
    page.wait_for_timeout(150)  # a file is read before its picture is asked for
    page.wait_for_selector("html[data-busy='0']")


def z_of(page):
    """The code that the address holds."""
    page.wait_for_timeout(400)
    values = re.search(r"[#&]z=([^&]*)", page.url).group(1).replace("%2C", ",")
    return np.array([float(value) for value in values.split(",")], np.float32)


def shows(page, world, z, selector="#picture", slack=2):
    """Whether a canvas shows what the model makes of a code (which the address has to three places)."""
    expected = world.decode(np.asarray(z, np.float32)[None])[0]
    found = pixels(page, selector)
    for channel in range(3):
        theirs = expected[channel if len(expected) == 3 else 0].astype(int)
        if np.abs(found[..., channel].astype(int) - theirs).max() > slack:
            return False
    return True


def place(page, plane_x, plane_y, world):
    """Where a place of the plane lies on the screen, at the first zoom."""
    box = page.locator("#map").bounding_box()
    points = world.map.points
    low, high = points.min(0), points.max(0)
    span = 1.1 * (high - low).max()
    x = box["x"] + box["width"] * (0.5 + (plane_x - (low + high)[0] / 2) / span)
    y = box["y"] + box["height"] * (0.5 - (plane_y - (low + high)[1] / 2) / span)
    return float(x), float(y)


def caption_place(page):
    return tuple(
        float(v) for v in re.search(r"\((-?[\d.]+), (-?[\d.]+)\)", page.inner_text("#picture-caption")).groups()
    )


# --- the map --------------------------------------------------------------------------------------------------------


def test_it_opens_with_a_typical_image(page, wide):
    assert page.inner_text("#title") == "mlp on digits"
    assert "20 latent dimensions, grey images of 28×28" in page.inner_text("#subtitle")
    row = wide.info["typical"][0]
    assert page.inner_text("#picture-caption") == f"test image {row}, class 0, as the model sees it"
    assert shows(page, wide, wide.codes[row])
    assert page.locator("#legend li").all_inner_texts() == [str(d) for d in range(10)]
    assert "inverse PCA" in page.inner_text("#map-help")


def test_the_map_draws_every_class_in_its_colour(page, wide):
    picture = pixels(page, "#map").reshape(-1, 3).astype(int)
    for colour in wide.info["colours"]:
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        near = np.abs(picture - rgb).sum(1) < 90
        assert near.sum() > 20, f"no point in {colour}"


def test_a_pointer_that_moves_decodes_under_it_and_what_was_kept_comes_back(page, wide):
    kept = wide.codes[wide.info["typical"][0]]
    for target in ((0.5, 0.7), (-1.2, 0.4)):
        page.mouse.move(*place(page, *target, wide), steps=3)
        settled(page)
        found = caption_place(page)
        assert np.allclose(found, target, atol=0.05)
        z = wide.map.origin + np.array(found, np.float32) @ wide.map.directions
        assert shows(page, wide, z, slack=6), "the caption has two places"
    assert not shows(page, wide, kept)
    page.mouse.move(5, 5)
    settled(page)
    assert shows(page, wide, kept)


def test_a_click_keeps_a_place(page, wide):
    page.mouse.click(*place(page, 0.8, -0.5, wide))
    settled(page)
    z = z_of(page)
    assert np.allclose((z - wide.map.origin) @ wide.map.directions.T, (0.8, -0.5), atol=0.05)
    page.mouse.move(5, 5)
    settled(page)
    assert shows(page, wide, z)
    assert "Decoded" in page.inner_text("#status")


def hovered(page, x, y):
    page.mouse.move(x, y)
    page.mouse.move(x + 0.5, y)
    settled(page)
    return np.array(caption_place(page))


def test_wheel_buttons_and_keys_zoom(page, wide):
    box = page.locator("#map").bounding_box()
    x, y = box["x"] + 0.75 * box["width"], box["y"] + 0.25 * box["height"]
    middle = hovered(page, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    before = hovered(page, x, y)
    page.mouse.wheel(0, -600)
    assert np.allclose(hovered(page, x, y), before, atol=0.04), "what lies under the pointer stays there"
    page.click("#zoom-all")
    assert np.allclose(hovered(page, x, y), before, atol=0.02)
    page.click("#zoom-in")
    closer = hovered(page, x, y)
    assert np.allclose(closer - middle, (before - middle) / 1.5, atol=0.04)
    page.click("#zoom-out")
    assert np.allclose(hovered(page, x, y), before, atol=0.03)
    page.locator("#map").focus()
    page.keyboard.press("+")
    assert np.linalg.norm(hovered(page, x, y) - before) > 0.05
    page.keyboard.press("0")
    assert np.allclose(hovered(page, x, y), before, atol=0.02)


def test_dragging_pans_and_keeps_nothing(page, wide):
    box = page.locator("#map").bounding_box()
    x, y = box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"]
    before, kept = hovered(page, x, y), z_of(page)
    page.mouse.down()
    page.mouse.move(x + 60, y + 40, steps=5)
    page.mouse.up()
    assert np.allclose(hovered(page, x + 60, y + 40), before, atol=0.03), "the plane moved with the pointer"
    assert np.array_equal(z_of(page), kept)


def test_arrow_keys_move_on_the_map(page, wide):
    page.mouse.click(*place(page, 0.0, 0.0, wide))
    settled(page)
    page.mouse.move(5, 5)
    page.locator("#map").focus()
    for key, axis, sign in (("ArrowRight", 0, 1), ("ArrowUp", 1, 1), ("ArrowLeft", 0, -1), ("ArrowDown", 1, -1)):
        before = np.array(caption_place(page))
        page.keyboard.press(key)
        settled(page)
        moved = np.array(caption_place(page)) - before
        assert sign * moved[axis] > 0.05
        assert abs(moved[1 - axis]) < 0.02
    one = np.array(caption_place(page))
    page.keyboard.press("Shift+ArrowRight")
    settled(page)
    assert (np.array(caption_place(page)) - one)[0] > 0.2, "Shift takes larger steps"
    assert shows(page, wide, z_of(page))


# --- the picture and its dimensions ---------------------------------------------------------------------------------


def test_sliders_stand_by_rate_and_move_one_dimension(page, wide):
    order = wide.info["order"]
    names = page.locator("#sliders .slider:not([hidden]) > span:first-child").all_inner_texts()
    assert names == [f"z{d + 1} {wide.info['rate'][d]:.2f} nats" for d in order[:16]]
    before = z_of(page)
    slider = page.locator("#sliders input").first
    slider.focus()
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    settled(page)
    after = z_of(page)
    assert np.flatnonzero(np.abs(after - before) > 0.005).tolist() == [order[0]]
    assert after[order[0]] == pytest.approx(before[order[0]] + 0.3, abs=0.02)
    assert shows(page, wide, after)
    row = wide.info["typical"][0]
    assert page.inner_text("#picture-caption") == (
        f"test image {row}, class 0, as the model sees it, z{order[0] + 1} = {after[order[0]]:.2f}"
    )
    page.click("#all-sliders")
    assert page.locator("#sliders .slider:not([hidden])").count() == 20
    page.click("#reset")
    settled(page)
    assert np.allclose(z_of(page), before, atol=1e-3)
    assert shows(page, wide, before)


def test_images_to_start_from(page, wide):
    page.get_by_role("button", name="a typical 7").click()
    settled(page)
    row = wide.info["typical"][7]
    assert np.allclose(z_of(page), wide.codes[row], atol=1e-3)
    page.fill("#row", "31")
    page.locator("#row").press("Enter")
    settled(page)
    assert np.allclose(z_of(page), wide.codes[31], atol=1e-3)
    assert shows(page, wide, wide.codes[31])
    page.fill("#row", "180")
    page.locator("#row").press("Enter")
    expect(page.locator("#status")).to_have_text("There are test images 0 to 179")
    page.click("#any-row")
    assert 0 <= int(page.input_value("#row")) < 180


def test_temperature_spreads_what_is_drawn(page, wide):
    def spread(temperature):
        page.locator("#temperature").evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", temperature
        )
        found = []
        for _ in range(6):
            page.click("#randomise")
            found.append(z_of(page))
        return np.std(found, 0).max()

    assert spread("0") < 1e-6, "at 0 every draw is the prior's mean"
    assert spread("0.5") < spread("2")
    assert page.inner_text("#temperature-value") == "2.00"


def test_the_gallery_sends_a_sample_to_the_sliders(page, wide):
    assert page.locator("#gallery button").count() == 24
    page.get_by_role("button", name="sample 5", exact=True).click()
    settled(page)
    z = z_of(page)
    assert shows(page, wide, z)
    assert shows(page, wide, z, "#gallery button:nth-child(5) canvas")
    first = pixels(page, "#gallery button:nth-child(1) canvas")
    page.click("#more")
    settled(page)
    assert (pixels(page, "#gallery button:nth-child(1) canvas") != first).any()


def test_the_picture_can_be_saved(page, wide):
    with page.expect_download() as download:
        page.click("#save-picture")
    with Image.open(download.value.path()) as picture:
        assert picture.size == (28, 28)
        expected = wide.decode(wide.codes[wide.info["typical"][0]][None])[0, 0]
        assert np.abs(np.asarray(picture.convert("L")).astype(int) - expected).max() <= 2


# --- drawing --------------------------------------------------------------------------------------------------------

STROKE = [(0.15, 0.1), (0.3, 0.1), (0.3, 0.5)]  # a 7 in the corner, small


def stroke(page, points):
    stroke_only(page, points)
    settled(page)


def stroke_only(page, points):
    page.locator("#pad").scroll_into_view_if_needed()
    box = page.locator("#pad").bounding_box()
    where = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*where[0])
    page.mouse.down()
    for point in where[1:]:
        page.mouse.move(*point, steps=6)
    page.mouse.up()


def seen(page):
    return pixels(page, "#seen")[..., 0].astype(float) / 255


def test_a_drawing_is_centred_and_scaled_as_mnist_was_and_judged(page, wide):
    stroke(page, STROKE)
    x = seen(page)
    rows, columns = (np.flatnonzero(x.max(axis) > 0.3) for axis in (1, 0))
    assert 18 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 21, "its longer side fills a box of 20 pixels"
    mass = np.array([(x.sum(axis) * (np.arange(28) + 0.5)).sum() / x.sum() for axis in (1, 0)])
    assert np.abs(mass - 14).max() < 0.6, "its centre of mass is in the middle"
    found = wide.score(x.astype(np.float32)[None, None])
    assert np.abs(pixels(page, "#rebuilt")[..., 0].astype(int) - found.mean[0, 0]).max() <= 2
    total = float(found.distortion[0] + found.rate[0])
    text = page.inner_text("#verdict")
    assert float(re.match(r"-?[\d.]+", text).group()) == pytest.approx(total, abs=1)
    share = (np.array(wide.info["score"]["sorted"]) < total).mean()
    assert f"higher than {100 * share:.1f} % of 180 test images" in text
    unusual = share >= 0.99
    assert ("This is unusual." in text) == unusual
    assert np.allclose(z_of(page), found.loc[0], atol=0.02), "and it is placed on the map"
    page.click("#clear")
    assert page.inner_text("#verdict") == ""
    assert seen(page).max() == 0


def test_what_no_digit_looks_like_is_unusual(page, wide):
    for i in range(6):
        stroke(page, [(0.05, 0.1 + 0.15 * i), (0.95, 0.15 + 0.15 * i)])
    assert "This is unusual." in page.inner_text("#verdict")
    assert "unusual" in (page.locator("#verdict").get_attribute("class") or "")


def test_an_image_file_is_scaled_inverted_and_judged(page, wide, tmp_path):
    ink = np.full((90, 120), 255, np.uint8)
    ink[20:70, 55:65] = 0  # a dark 1 on paper; the data are light on dark
    Image.fromarray(ink).save(tmp_path / "one.png")
    page.set_input_files("#file", tmp_path / "one.png")
    settled(page)
    assert page.is_checked("#invert")
    x = seen(page)
    assert x[14, 14] > 0.8
    assert x[:, 0].max() < 0.1
    assert "one.png: scaled to 28×28" in page.inner_text("#status")
    page.uncheck("#invert")
    settled(page)
    assert seen(page)[14, 14] < 0.2
    (tmp_path / "no.png").write_bytes(b"no image")
    page.set_input_files("#file", tmp_path / "no.png")
    expect(page.locator("#status")).to_have_text("This did not work: no.png is not an image that this browser can read")


def test_an_image_can_be_dropped(page, wide):
    buffer = io.BytesIO()
    Image.fromarray(np.full((28, 28), 200, np.uint8)).save(buffer, "PNG")
    page.locator("#draw-panel").evaluate(
        """(panel, data) => { const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], 'dropped.png', {type: 'image/png'}));
            panel.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true})); }""",
        list(buffer.getvalue()),
    )
    expect(page.locator("#status")).to_contain_text("dropped.png: scaled")
    settled(page)
    assert "nats" in page.inner_text("#verdict")


def test_ink_on_a_transparent_ground_is_seen(page, tmp_path):
    picture = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (25, 10, 35, 50))
    picture.save(tmp_path / "ink.png")
    page.set_input_files("#file", tmp_path / "ink.png")
    settled(page)
    assert page.is_checked("#invert")
    assert seen(page)[14, 14] > 0.8
    assert seen(page)[2, 2] < 0.1


def test_invert_stays_from_stroke_to_stroke(page):
    stroke(page, STROKE)
    page.check("#invert")
    stroke(page, [(0.5, 0.5), (0.6, 0.6)])
    assert page.is_checked("#invert")
    assert seen(page)[1, 1] > 0.9
    page.click("#clear")
    assert not page.is_checked("#invert"), "these data are light on dark"


def test_an_answer_that_comes_too_late_changes_nothing(page, wide):
    page.route("**/api/score", lambda route: (page.wait_for_timeout(600), route.continue_()))
    stroke_only(page, STROKE)
    page.click("#clear")
    page.wait_for_timeout(1200)
    assert page.inner_text("#verdict") == ""
    stroke_only(page, STROKE)
    page.click("#randomise")
    z = z_of(page)
    page.wait_for_timeout(1200)
    assert np.array_equal(z_of(page), z)
    assert "nats" in page.inner_text("#verdict"), "the drawing is judged all the same"
    page.unroute_all(behavior="wait")


# --- between and beyond ---------------------------------------------------------------------------------------------


def keep(page, *names):
    codes = []
    for name, digit in names:
        page.get_by_role("button", name=f"a typical {digit}").click()
        page.click(f"#keep-{name}")
        settled(page)
        codes.append(z_of(page))
    return codes


@pytest.mark.parametrize("way", ["linear", "spherical"])
def test_interpolation_by_hand_and_as_a_gif(page, wide, way):
    assert page.is_disabled("#play")
    a, b = keep(page, ("A", 1), ("B", 8))
    assert shows(page, wide, a, "#slot-A")
    assert shows(page, wide, b, "#slot-B")
    page.select_option("#way", way)
    page.locator("#position").evaluate("(e) => { e.value = 0.25; e.dispatchEvent(new Event('input')); }")
    settled(page)
    expected = figures.between(*(torch.from_numpy(z) for z in (a, b)), torch.tensor([0.25]), way)[0].numpy()
    assert np.allclose(z_of(page), expected, atol=5e-3)
    assert shows(page, wide, z_of(page))
    with page.expect_download() as download:
        page.click("#download")
    with Image.open(download.value.path()) as film:
        assert film.info["loop"] == 0
        assert film.n_frames == 46, "there and back"
        for frame, t in ((0, 0.0), (10, 10 / 23), (23, 1.0), (45, 1 / 23)):
            film.seek(frame)
            z = figures.between(*(torch.from_numpy(z) for z in (a, b)), torch.tensor([t]), way).numpy()
            small = np.asarray(film.convert("L"))[3::6, 3::6]
            assert small.shape == (28, 28)
            assert np.abs(small.astype(int) - wide.decode(z)[0, 0]).max() <= 3


def test_play_moves_and_stops(page, wide):
    keep(page, ("A", 0), ("B", 1))
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Stop")
    page.wait_for_timeout(700)
    assert float(page.input_value("#position")) > 0.1
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Play A → B")
    page.wait_for_timeout(200)
    where = page.input_value("#position")
    page.wait_for_timeout(300)
    assert page.input_value("#position") == where


def test_what_is_chosen_while_it_plays_stays(page, wide):
    keep(page, ("A", 0), ("B", 1))
    for _ in range(3):
        page.click("#play")
        page.click("#play")
    page.click("#play")
    page.wait_for_timeout(400)
    page.click("#randomise")
    settled(page)
    expect(page.locator("#play")).to_have_text("Play A → B")
    z = z_of(page)
    page.wait_for_timeout(300)
    assert np.array_equal(z_of(page), z)
    assert shows(page, wide, z)
    assert "a draw from the prior" in page.inner_text("#picture-caption")


def test_what_is_kept_while_it_plays_is_what_is_shown(page, wide):
    a, b = keep(page, ("A", 0), ("B", 1))
    page.select_option("#way", "linear")
    page.click("#play")
    expect(page.locator("#play")).to_have_attribute("data-playing", "true")  # the film is there
    page.wait_for_timeout(300)
    page.click("#keep-C")
    settled(page)
    expect(page.locator("#play")).to_have_text("Play A → B")
    t = float(page.input_value("#position"))
    assert 0 < t < 1, "the code that was kept before is at 1"
    assert np.allclose(z_of(page), a + t * (b - a), atol=1e-2)
    assert shows(page, wide, z_of(page), "#slot-C")


def test_only_one_film_plays(page):
    keep(page, ("A", 0), ("B", 1))
    for _ in range(5):
        page.click("#play")
    before = page.evaluate(
        """() => new Promise((done) => { let count = 0;
            const watcher = new MutationObserver(() => { count++; });
            watcher.observe(document.getElementById('picture-caption'), {childList: true});
            setTimeout(() => { watcher.disconnect(); done(count); }, 1200); })"""
    )
    assert before <= 21, "one picture in 60 ms"
    page.click("#play")


def test_arithmetic_adds_and_subtracts_codes(page, wide):
    assert page.is_disabled("#sum")
    a, b, c = keep(page, ("A", 3), ("B", 5), ("C", 8))
    page.click("#sum")
    settled(page)
    assert np.allclose(z_of(page), a - b + c, atol=5e-3)
    assert shows(page, wide, z_of(page))


# --- links ----------------------------------------------------------------------------------------------------------


def test_a_link_brings_a_state_back(page, opened, wide):
    keep(page, ("A", 3), ("B", 5))
    page.select_option("#way", "spherical")
    page.click("#randomise")
    z = z_of(page)
    again = opened(page.url)
    settled(again)
    assert np.allclose(z_of(again), z, atol=1e-6)
    assert shows(again, wide, z)
    assert again.input_value("#way") == "spherical"
    assert not again.is_disabled("#play")
    assert again.input_value("#row") == page.input_value("#row")


@pytest.mark.parametrize(
    "link", ["#z=1,2", "#z=a,b&start=-4&t=99", "#z=" + ",".join(["1e9"] * 20), "#start=1.5", "#%%%", "#z="]
)
def test_links_that_do_not_fit_start_anew(opened, address, wide, link):
    page = opened(f"{address}/{link}")
    assert page.inner_text("#status") == "Ready"
    assert page.input_value("#row") == str(wide.info["typical"][0])
    assert page.input_value("#temperature") == "1"


def test_a_model_of_one_dimension_starts_with_nothing_kept(opened, tmp_path):
    world = World(scene_of(trained(tmp_path, "mlp-2d", "--data", "digits", "--latent-dim", "1", "--epochs", "1")))
    with served(world) as address:
        page = opened(address)
        assert page.inner_text("#picture-caption").startswith("test image"), "no code of a link"
        assert page.is_disabled("#play"), "A and B are empty"
        keep(page, ("A", 3), ("B", 5))
        z = z_of(page)
        again = opened(page.url)
        assert np.allclose(z_of(again), z, atol=1e-6)
        assert not again.is_disabled("#play")


def test_the_skip_link_leaves_the_state_as_it_is(page):
    keep(page, ("A", 3), ("B", 5))
    before = page.inner_text("#picture-caption")
    page.locator(".skip").evaluate("(link) => link.click()")
    page.wait_for_function("location.hash === '#map-panel'")
    settled(page)
    assert page.inner_text("#picture-caption") == before
    assert not page.is_disabled("#play")


# --- for everybody --------------------------------------------------------------------------------------------------


def test_touch_explores_keeps_and_pinches(opened, address, wide):
    page = opened(address, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator("#map").scroll_into_view_if_needed()
    x, y = place(page, 0.5, 0.5, wide)
    page.touchscreen.tap(x, y)
    settled(page)
    first = np.array(caption_place(page))
    assert np.allclose(first, (0.5, 0.5), atol=0.08)
    assert shows(page, wide, z_of(page))
    assert shows(page, wide, z_of(page), "#preview"), "a small picture lies on the map, as the large one is below"
    session = page.context.new_cdp_session(page)

    def touch(kind, *points):
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": a, "y": b, "id": i} for i, (a, b) in enumerate(points)]})  # fmt: skip

    touch("touchStart", (x, y))
    touch("touchMove", (x + 40, y))
    settled(page)
    moved = np.array(caption_place(page))
    assert moved[0] > first[0] + 0.2, "a finger that moves decodes under it"
    touch("touchEnd")
    page.click("#zoom-all")
    touch("touchStart", (x - 20, y))
    touch("touchStart", (x - 20, y), (x + 20, y))
    touch("touchMove", (x - 60, y), (x + 60, y))
    touch("touchEnd")
    page.wait_for_timeout(100)
    page.touchscreen.tap(x + 60, y)
    settled(page)
    span = np.array(caption_place(page)) - first
    page.click("#zoom-all")
    page.touchscreen.tap(x + 60, y)
    settled(page)
    assert 0 < span[0] < 0.6 * (np.array(caption_place(page)) - first)[0], "two fingers zoom"


def test_a_finger_draws(opened, address):
    page = opened(address, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.locator("#pad").scroll_into_view_if_needed()
    box = page.locator("#pad").bounding_box()
    session = page.context.new_cdp_session(page)

    def touch(kind, *points):
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": box["x"] + a * box["width"], "y": box["y"] + b * box["height"]} for a, b in points]})  # fmt: skip

    touch("touchStart", (0.5, 0.2))
    for step in range(1, 8):
        touch("touchMove", (0.5, 0.2 + 0.08 * step))
    touch("touchEnd")
    settled(page)
    assert seen(page).max() > 0.8
    assert "nats" in page.inner_text("#verdict")


def test_everything_can_be_reached_and_has_a_name(page):
    names = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, canvas, a')].map((e) => [e.tagName, e.id,
            e.getAttribute('aria-label') || e.getAttribute('aria-hidden') || e.labels?.[0]?.textContent.trim() || e.textContent.trim()
            || e.closest('[aria-label]')?.getAttribute('aria-label')])"""
    )
    assert len(names) > 60
    assert [name for name in names if not name[2]] == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    visited = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        visited.add(page.evaluate("document.activeElement.id"))
    assert {
        "map",
        "zoom-in",
        "reset",
        "randomise",
        "temperature",
        "row",
        "clear",
        "file",
        "keep-A",
        "way",
        "more",
    } <= visited


def test_status_and_verdict_are_told_to_screen_readers(page):
    live = page.evaluate("[...document.querySelectorAll('[aria-live], [role=status], output')].map((e) => e.id)")
    assert live == ["status", "verdict"], "and nothing else speaks up"
    headings = page.locator("main h2").all_inner_texts()
    assert headings == ["Latent map", "Picture", "Dimensions", "Draw or drop an image", "Between and beyond", "Samples"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(opened, address, scheme):
    page = opened(address, color_scheme=scheme)
    ratios = page.evaluate(
        """() => { const light = (rgb) => { const [r, g, b] = rgb.map((v) => { v /= 255;
              return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
            const behind = (e) => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
              if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
            return [...document.querySelectorAll('h1, h2, p, span, small, button, label, li, figcaption')]
              .filter((e) => e.textContent.trim() && !e.disabled && e.offsetParent).map((e) => {
                const [a, b] = [light(numbers(getComputedStyle(e).color).slice(0, 3)), light(behind(e))];
                return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.trim().slice(0, 30)]; }); }"""
    )
    assert len(ratios) > 40
    assert [pair for pair in ratios if pair[0] < 4.5] == []


# --- other models, other hosts --------------------------------------------------------------------------------------


def test_a_plane_is_decoded_as_it_is(opened, plane):
    with served(plane) as address:
        page = opened(address)
        target = np.quantile(plane.map.points, 0.8, axis=0)
        page.mouse.click(*place(page, *target, plane))
        settled(page)
        assert np.allclose(z_of(page), target, atol=0.01 * np.ptp(plane.map.points))
        assert shows(page, plane, z_of(page))
        assert "the latent dimensions themselves" in page.inner_text("#map-help")
        assert "Axes: z₁, z₂." in page.inner_text("#map-help")
        assert page.locator("#sliders .slider").count() == 2
        page.close()


def test_on_a_map_of_neighbours_the_closest_image_is_decoded(opened, wide, monkeypatch):
    world = World.__new__(World)
    world.__dict__.update(wide.__dict__)
    world.map = figures.project(wide.codes, "tsne")
    world.info = {
        **wide.info,
        "map": {"how": "tsne", "axes": ["t-SNE 1", "t-SNE 2"], "origin": None, "directions": None},
    }
    with served(world) as address:
        page = opened(address)
        row = 17
        page.mouse.click(*place(page, *(float(v) for v in world.map.points[row]), world))
        settled(page)
        assert page.inner_text("#picture-caption") == f"test image {row}, class {wide.labels[row]}"
        assert np.allclose(z_of(page), wide.codes[row], atol=1e-3)
        assert "No point stands for a code" in page.inner_text("#map-help")
        page.locator("#map").focus()
        page.keyboard.press("ArrowRight")
        settled(page)
        other = int(re.search(r"test image (\d+)", page.inner_text("#picture-caption")).group(1))
        assert other != row
        assert world.map.points[other][0] > world.map.points[row][0]
        page.close()


def test_colour_images_of_another_size(opened, colour):
    with served(colour) as address:
        page = opened(address)
        assert pixels(page, "#picture").shape == (24, 16, 3)
        assert shows(page, colour, colour.codes[0])
        assert page.is_visible("#ink")
        assert page.inner_text("#picture-caption") == "test image 0, as the model sees it"
        page.locator("#ink").evaluate("(e) => { e.value = '#ff0000'; e.dispatchEvent(new Event('input')); }")
        stroke(page, [(0.2, 0.5), (0.8, 0.5)])
        drawn = pixels(page, "#seen").astype(int)
        assert drawn[..., 0].max() > 200
        assert drawn[..., 1:].max() < 60
        assert "−ELBO" in page.inner_text("#verdict")
        page.close()


def test_binary_pixels_are_given_binary_drawings(opened, tmp_path):
    run = trained(tmp_path, "mlp", "--data", "digits", "--protocol", "dynamic", "--epochs", "2", "--z-dim", "4")
    world = World(scene_of(run))
    with served(world) as address:
        page = opened(address)
        stroke(page, STROKE)
        assert set(np.unique(seen(page))) == {0.0, 1.0}
        found = world.score(seen(page).astype(np.float32)[None, None])
        total = float(found.distortion[0] + found.rate[0])
        assert float(re.match(r"-?[\d.]+", page.inner_text("#verdict")).group()) == pytest.approx(total, abs=0.2)
        assert "(−ELBO at the mean" in page.inner_text("#verdict")
        page.close()


def test_few_test_images_call_nothing_unusual(opened, colour):
    with served(colour) as address:
        page = opened(address)
        stroke(page, [(0.1, 0.1), (0.9, 0.9)])
        assert "unusual" not in page.inner_text("#verdict")
        assert "of 6 test images" in page.inner_text("#verdict")
        assert "too few test images" in page.inner_text("#scale-help")
        page.close()


def test_a_server_that_is_gone_is_told_once_and_clearly(opened, wide):
    with served(wide) as address:
        page = opened(address)
    page.click("#randomise")
    expect(page.locator("#status")).to_contain_text("This did not work")
    assert all("ERR_CONNECTION" in text for text in opened.said)
    opened.said.clear()


@pytest.fixture(scope="module")
def site(colour, wide, tmp_path_factory):
    out = tmp_path_factory.mktemp("static")
    try:
        for name, world in (("wide", wide), ("colour", colour)):
            static.write_static(world, out / name, "npm")
    except FailureError as error:
        pytest.skip(f"onnxruntime-web cannot be had here: {error}")
    except Exception as error:
        if "npm" in str(error):
            pytest.skip(str(error))
        raise
    with static_host(out) as address:
        yield address


def test_a_static_page_does_the_same_without_a_server(opened, site, wide):
    page = opened(f"{site}/wide/")
    assert shows(page, wide, wide.codes[wide.info["typical"][0]])
    page.mouse.click(*place(page, 0.3, 0.6, wide))
    settled(page)
    assert shows(page, wide, z_of(page))
    stroke(page, STROKE)
    found = wide.score(seen(page).astype(np.float32)[None, None])
    total = float(found.distortion[0] + found.rate[0])
    assert float(re.match(r"-?[\d.]+", page.inner_text("#verdict")).group()) == pytest.approx(total, abs=1)
    assert np.abs(pixels(page, "#rebuilt")[..., 0].astype(int) - found.mean[0, 0]).max() <= 2
    keep(page, ("A", 1), ("B", 8))
    with page.expect_download() as download:
        page.click("#download")
    with Image.open(download.value.path()) as film:
        assert film.n_frames == 46


def test_a_static_page_of_colour_images(opened, site, colour):
    page = opened(f"{site}/colour/")
    assert shows(page, colour, colour.codes[0])
    page.click("#randomise")
    settled(page)
    assert shows(page, colour, z_of(page))


def test_a_runtime_that_was_changed_is_not_run(opened, site, tmp_path_factory):
    page = opened("about:blank", ready=False)
    page.route(
        "**/ort.wasm.bundle.min.mjs",
        lambda route: route.fulfill(body="export default 1", content_type="text/javascript"),
    )
    page.goto(f"{site}/wide/")
    expect(page.locator("#status")).to_contain_text("The explorer could not start")
    assert any("integrity" in text for text in opened.said)
    opened.said.clear()
