"""The explorer's server: it gives the model's numbers, refuses what is wrong with a 4xx, and tells no more than it should."""

import concurrent.futures
import json
import math
import subprocess
import sys
import time

import httpx2 as httpx
import numpy as np
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from starlette.testclient import TestClient

import vaelab
from serving import served
from vaelab import figures
from vaelab.cli import main
from vaelab.drawing.scene import scene_of
from vaelab.errors import FailureError, UsageError
from vaelab.explorer import server, static
from vaelab.explorer.world import DRAWS, World


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("a-secret-place") / "run"
    assert (
        main(
            [
                "train",
                "mlp",
                "--data",
                "digits",
                "--epochs",
                "4",
                "--batch-size",
                "32",
                "--z-dim",
                "6",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


@pytest.fixture(scope="module")
def world(run):
    return World(scene_of(run))


@pytest.fixture(scope="module")
def app(world):
    return server.application(world)


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


# --- what it tells --------------------------------------------------------------------------------------------------


def test_the_run_is_described_without_a_path(run, world, client):
    answer = client.get("/run.json")
    assert answer.status_code == 200
    info = answer.json()
    assert info["title"] == "mlp on digits"
    assert (info["shape"], info["latent"], info["count"]) == ([1, 28, 28], 6, 180)
    assert info["order"] == sorted(range(6), key=lambda d: -info["rate"][d])
    for path in ("/", "/app.js", "/run.json", "/openapi.json"):
        text = client.get(path).text
        assert str(run) not in text
        assert "a-secret-place" not in text


def test_points_and_pixels_are_those_of_the_test_images(world, client, digits):
    numbers = np.frombuffer(client.get("/points.bin").content, "<f4")
    places, codes, draws = np.split(numbers, [2 * 180, 2 * 180 + 6 * 180])
    x = digits.test.rows(slice(None)).x
    expected = figures.encode(world.model, x)
    np.testing.assert_allclose(codes.reshape(180, 6), expected, atol=1e-4)
    np.testing.assert_array_equal(places.reshape(180, 2), world.map.points)
    assert draws.size == 6 * DRAWS
    assert abs(draws.mean()) < 0.1
    assert draws.std() == pytest.approx(1, abs=0.05)
    pixels = np.frombuffer(client.get("/images.bin").content, np.uint8)
    np.testing.assert_array_equal(pixels.reshape(x.shape), (x * 255).round().numpy())
    assert world.info["labels"] == digits.test.y.tolist()


def test_a_point_of_the_map_stands_for_a_code_of_its_plane(world):
    origin, directions = np.array(world.info["map"]["origin"]), np.array(world.info["map"]["directions"])
    again = (world.codes - origin) @ directions.T
    np.testing.assert_allclose(again, world.map.points, atol=1e-3)


def test_scores_are_compared_with_all_test_images_whatever_the_map_shows(run, world, digits):
    found = world.score(digits.test.rows(slice(None)).x.numpy())
    totals = np.sort(found.distortion + found.rate)
    np.testing.assert_allclose(world.info["score"]["sorted"], totals, atol=0.01)
    assert World(scene_of(run), images=5).info["score"] == world.info["score"]
    assert world.info["score"]["what"].startswith("cross-entropy + KL"), "grey pixels have no likelihood"


def test_scores_that_are_not_finite_are_null_and_no_page_is_broken_by_them(world, monkeypatch, digits):
    from dataclasses import replace

    whole, first = World.score, []

    def broken(self, x):
        found = whole(self, x)
        first.append(len(x))
        return replace(found, rate=np.r_[[np.inf, np.nan], found.rate[2:]].astype(np.float32)[: len(x)])

    monkeypatch.setattr(World, "score", broken)
    other = World(world.scene)
    assert len(other.info["score"]["sorted"]) == 178
    with TestClient(server.application(other), base_url="http://127.0.0.1") as client:
        assert client.get("/run.json").status_code == 200
        answer = client.post("/api/score", json={"x": digits.test.rows(slice(0, 3)).x.flatten(1).tolist()})
    assert answer.json()["rate"][:2] == [None, None]
    assert math.isfinite(answer.json()["rate"][2])


def test_typical_images_are_one_of_each_class(world):
    assert [world.info["labels"][row] for row in world.info["typical"]] == list(range(10))


# --- what it answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, server.ROWS])
def test_decoding_gives_the_models_pictures(world, client, rows):
    z = torch.randn(rows, 6)
    answer = client.post("/api/decode", json={"z": z.tolist()})
    assert answer.status_code == 200
    found = np.frombuffer(answer.content, np.uint8).reshape(rows, 1, 28, 28)
    with torch.no_grad():
        expected = world.model.likelihood(z).mean.numpy() * 255
    assert np.abs(found - expected).max() < 0.51


def test_scoring_gives_the_models_numbers(world, client, digits):
    x = digits.test.rows(slice(0, 5)).x
    answer = client.post("/api/score", json={"x": x.flatten(1).tolist()})
    found = answer.json()
    with torch.no_grad():
        qz = world.model.posterior(x)
        px = world.model.likelihood(qz.mean)
    kl = (0.5 * (qz.mean**2 + qz.stddev**2 - 1) - qz.stddev.log()).sum(1)
    np.testing.assert_allclose(found["loc"], qz.mean, atol=1e-4)
    np.testing.assert_allclose(found["scale"], qz.stddev, atol=1e-4)
    np.testing.assert_allclose(found["distortion"], -px.log_prob(x), rtol=1e-4)
    np.testing.assert_allclose(found["rate"], kl, rtol=1e-3)
    assert np.abs(np.array(found["mean"]).reshape(px.mean.shape) - 255 * px.mean.numpy()).max() < 0.51


GOOD = [[0.0] * 6]


@pytest.mark.parametrize(("content", "code", "message"), [
    (b"", 400, "not JSON"),
    (b"{", 400, "not JSON"),
    (b"\xff\xfe", 400, "not JSON"),
    (b"[" * 100_000, 400, "not JSON"),
    (b"null", 422, "one object"),
    (b"[]", 422, "one object"),
    (b"{}", 422, "one object"),
    (json.dumps({"z": GOOD, "y": 1}).encode(), 422, "one object"),
    (json.dumps({"z": []}).encode(), 422, "1 to 64 rows"),
    (json.dumps({"z": GOOD * 65}).encode(), 422, "1 to 64 rows"),
    (json.dumps({"z": "abc"}).encode(), 422, "1 to 64 rows"),
    (json.dumps({"z": [[0.0] * 5]}).encode(), 422, "6 numbers"),
    (json.dumps({"z": [[0.0] * 7]}).encode(), 422, "6 numbers"),
    (json.dumps({"z": [0.0] * 6}).encode(), 422, "6 numbers"),
    (json.dumps({"z": [[[0.0]] * 6]}).encode(), 422, "from -1000 to 1000"),
    (b'{"z": [[NaN, 0, 0, 0, 0, 0]]}', 422, "from -1000 to 1000"),
    (b'{"z": [[Infinity, 0, 0, 0, 0, 0]]}', 422, "from -1000 to 1000"),
    (b'{"z": [[1e999, 0, 0, 0, 0, 0]]}', 422, "from -1000 to 1000"),
    (b'{"z": [[1001, 0, 0, 0, 0, 0]]}', 422, "from -1000 to 1000"),
    (b'{"z": [[' + b"9" * 4000 + b", 0, 0, 0, 0, 0]]}", 422, "from -1000 to 1000"),
    (b'{"z": [[true, 0, 0, 0, 0, 0]]}', 422, "from -1000 to 1000"),
    (b'{"z": [["0", 0, 0, 0, 0, 0]]}', 422, "from -1000 to 1000"),
    (b'{"z": [[null, 0, 0, 0, 0, 0]]}', 422, "from -1000 to 1000"),
    (b'{"z": [' + b" " * server.LARGEST_BODY + b"]}", 413, "bytes"),
])  # fmt: skip
def test_what_is_wrong_is_refused_in_one_line(client, content, code, message):
    answer = client.post("/api/decode", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == code, answer.text
    assert message in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_pixels_out_of_range_are_refused(client):
    for value in (-0.1, 1.1, 255):
        answer = client.post("/api/score", json={"x": [[value] * 784]})
        assert (answer.status_code, "numbers from 0 to 1" in answer.json()["error"]) == (422, True)


def test_a_body_that_is_sent_in_pieces_is_limited_too(client):
    sent = 0

    def pieces():
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b" " * 100_000

    answer = client.post("/api/decode", content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_as_many_rows_are_promised_as_fit_into_a_request():
    counts = {columns: server.most_rows(columns) for columns in (2, 784, 3 * 64 * 64, 120_000)}
    assert counts == {2: 64, 784: 64, 3 * 64 * 64: 6, 120_000: 1}
    assert server.most_rows(8 * 8 * 64, server.CODES) == server.CODES
    codes = len(json.dumps({"z": [[-4.123456789012345e-05] * (8 * 8 * 64)] * server.CODES}))
    assert codes <= server.most_bytes(8 * 8 * 64, server.CODES)
    longest = len(json.dumps({"x": [[0.12345678901234567] * (3 * 64 * 64)] * 6}))
    assert longest <= server.LARGEST_BODY


def test_a_large_image_fits_into_a_request(tmp_path):
    from vaelab.config import override
    from vaelab.drawing.scene import Scene
    from vaelab.recipes import recipe
    from vaelab.training.trainer import build_model

    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (40, 200, 200, 3), np.uint8))
    data = vaelab.load(str(tmp_path / "a.npy"))
    run = override(recipe("mlp"), encoder_hidden_dims=(8,), decoder_hidden_dims=(8,))
    world = World(Scene(run, build_model(run, data.shape).eval(), data, [], 1))
    x = np.random.default_rng(1).random(120_000)
    with TestClient(server.application(world), base_url="http://127.0.0.1") as client:
        answer = client.post("/api/score", json={"x": [x.tolist()]})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["mean"][0]) == 120_000


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_kinds_of_content_are_refused(client, kind):
    answer = client.post("/api/decode", content=json.dumps({"z": GOOD}), headers={"content-type": kind})
    assert answer.status_code == 415


@pytest.mark.parametrize(("method", "path", "code"), [
    ("GET", "/api/decode", 405), ("DELETE", "/run.json", 405), ("GET", "/nothing", 404), ("GET", "/../server.py", 404),
    ("GET", "/page/../../world.py", 404), ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404), ("GET", "/api/decode/", 404),
])  # fmt: skip
def test_other_addresses_and_methods(client, method, path, code):
    answer = client.request(method, path, follow_redirects=True)
    assert answer.status_code in (code, 405)
    assert "error" in answer.json()


def test_extreme_images_are_answered_with_finite_numbers(client):
    for value in (0.0, 1.0):
        found = client.post("/api/score", json={"x": [[value] * 784]}).json()
        assert all(math.isfinite(v) for v in (*found["loc"][0], *found["distortion"], *found["rate"]))
    pixels = client.post("/api/decode", json={"z": [[1000.0] * 6, [-1000.0] * 6]})
    assert (pixels.status_code, len(pixels.content)) == (200, 2 * 784)


# --- who may ask ----------------------------------------------------------------------------------------------------


def test_another_name_for_this_machine_is_refused(app):
    with TestClient(app, base_url="http://attacker.example") as other:
        assert other.get("/run.json").status_code == 400
        assert other.post("/api/decode", json={"z": GOOD}).status_code == 400


def test_answers_forbid_what_the_page_does_not_need(client):
    for path in ("/", "/run.json", "/nothing"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_a_failure_tells_nothing_of_the_machine(app, world, monkeypatch):
    def broken(z):
        raise RuntimeError("/a-secret-place/file")

    monkeypatch.setattr(world, "decode", broken)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = client.post("/api/decode", json={"z": GOOD})
    assert answer.status_code == 500
    assert answer.json() == {"error": "the server failed; its terminal says why"}


def test_nothing_is_written(run, client):
    before = snapshot(run.parent)
    world = World(scene_of(run))
    with TestClient(server.application(world), base_url="http://127.0.0.1") as other:
        for path in ("/", "/run.json", "/points.bin", "/images.bin"):
            assert other.get(path).status_code == 200
        other.post("/api/decode", json={"z": GOOD})
        other.post("/api/score", json={"x": [[0.5] * 784]})
    assert snapshot(run.parent) == before


def test_fifty_clients_at_once(world):
    """Every one gets its own picture; how fast, benchmarks/explorer.py measures."""
    codes = torch.randn(50, 4, 6)
    with served(world) as address, httpx.Client(limits=httpx.Limits(max_connections=50)) as clients:

        def ask(z):
            answers = [clients.post(f"{address}/api/decode", json={"z": [row.tolist()]}, timeout=30) for row in z]
            assert all(answer.status_code == 200 for answer in answers)
            return np.stack([np.frombuffer(answer.content, np.uint8).reshape(28, 28) for answer in answers])

        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            found = list(pool.map(ask, codes))
    for pictures, z in zip(found, codes, strict=True):
        assert np.abs(pictures.astype(int) - world.decode(z.numpy())[:, 0]).max() <= 1


# --- its description ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_the_server_does_what_its_description_says(app, mode):
    """Requests made from the description, that fit it and that do not: answers are those that it promises."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"host": "127.0.0.1"})
    schema.config.update(base_url="http://127.0.0.1")
    tried = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.method == "get" and mode is schemathesis.GenerationMode.NEGATIVE:
            continue  # there is nothing in them that could be wrong

        @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def answers(case):
            tried.add((case.method, case.path))
            case.call_and_validate(headers={"host": "127.0.0.1"})

        answers()
    assert ("POST", "/api/decode") in tried
    assert len(tried) == (5 if mode is schemathesis.GenerationMode.POSITIVE else 2)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_interrupted(run):
    command = [sys.executable, "-m", "vaelab", "explore", str(run), "--port", "0"]
    before = snapshot(run)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split()[0]
        assert httpx.get(f"{address}run.json", timeout=30).json()["latent"] == 6
        process.send_signal(2)
        _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors
    assert process.returncode in (0, 130)
    assert snapshot(run) == before


def test_a_busy_port_is_told_at_once(run, world, capsys):
    with served(world) as address:
        port = address.rpartition(":")[2]
        started = time.perf_counter()
        assert main(["explore", str(run), "--port", port]) == 2
        assert time.perf_counter() - started < 5
    assert f"--port {port} cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--images", "2"], "--images 2: must be at least 3"),
    (["--port", "70000"], "--port 70000: must be from 0 to 65,535"),
    (["--map", "own", "--port", "0"], "at most 2 of them: there are 6"),
    (["--runtime", "cdn"], "--runtime cdn is of a page that is written: give --static, or leave it out"),
    (["--static", "site", "--port", "0"], "--port 0 is of a page that is served, and --static site writes one"),
    (["--static", "site", "--open"], "--open is of a page that is served, and --static site writes one"),
])  # fmt: skip
def test_wrong_values_are_one_line(run, arguments, message, capsys):
    assert main(["explore", str(run), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_missing_packages_are_named(run, monkeypatch, capsys):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "uvicorn" else find(name, *a))
    assert main(["explore", str(run)]) == 2
    assert "exploring needs uvicorn: pip install uvicorn" in capsys.readouterr().err


def test_a_model_whose_latents_lie_in_no_vector_space_is_refused(run, monkeypatch):
    scene = scene_of(run)
    monkeypatch.setattr(scene.model.posterior_head, "space", "codes")
    with pytest.raises(
        UsageError, match="exploring needs latents that are any real vectors: those of this model lie in"
    ):
        World(scene)


# --- static files ---------------------------------------------------------------------------------------------------


def test_a_static_page_has_all_that_it_needs(run, world, tmp_path, capsys):
    assert main(["explore", str(run), "--static", str(tmp_path / "site"), "--runtime", "cdn"]) == 0
    assert "files" in capsys.readouterr().out
    site = tmp_path / "site"
    assert b'data-mode="static"' in (site / "index.html").read_bytes()
    assert json.loads((site / "run.json").read_text()) == world.info
    assert (site / "points.bin").read_bytes() == world.points()
    runtime = json.loads((site / "runtime.json").read_text())["runtime"]
    assert runtime["script"]["url"].startswith("https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/")
    assert all(part["integrity"].startswith("sha384-") for part in runtime.values())
    texts = [path.read_text(errors="ignore") for path in site.iterdir()]
    assert not any("a-secret-place" in text for text in texts)
    x = torch.rand(3, 1, 28, 28)
    found = vaelab.export.onnx_session((site / "scorer.onnx").read_bytes())(x.numpy())
    np.testing.assert_allclose(found[3], world.score(x.numpy()).distortion, rtol=1e-4)


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["explore", str(run), "--static", str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_nothing_that_is_given_away_tells_a_path(tmp_path, capsys):
    """Not of the data, not of the sources that traced the graphs."""
    import vaelab.export

    folder = tmp_path / "a-private-folder" / "pictures"
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", np.random.default_rng(0).random((60, 12, 9)).astype(np.float32))
    run, data = tmp_path / "run", str(folder / "images.npy")
    assert main(["train", "mlp", "--data", data, "--epochs", "1", "--out", str(run)]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "given")]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "given"), "--format", "safetensors"]) == 0
    assert main(["explore", str(run), "--static", str(tmp_path / "given" / "site"), "--runtime", "cdn"]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "given" / "report.html")]) == 0
    source = vaelab.export.__file__.rpartition("/vaelab/")[0]
    for path in (tmp_path / "given").rglob("*.*"):
        content = path.read_bytes() if path.is_file() else b""
        for private in ("a-private-folder", str(tmp_path), sys.prefix, source, "site-packages"):
            assert private.encode() not in content, f"{path.name} tells {private}"
    again = vaelab.load_model(tmp_path / "given" / "model.safetensors")
    assert again.shape == (1, 12, 9)


def test_npm_that_is_missing(run, world, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UsageError, match="npm needs the command npm"):
        static.write_static(world, tmp_path / "site", "npm")
    with caplog.at_level("INFO", "vaelab"):
        static.write_static(world, tmp_path / "site", "auto")
    assert "npm is not installed: the page takes onnxruntime-web from https://" in caplog.text


def test_a_package_that_was_changed_is_refused(world, tmp_path, monkeypatch):
    import io
    import tarfile

    class Npm:
        returncode, stderr = 0, ""

    def pack(command, **_):
        with tarfile.open(f"{command[-1]}/onnxruntime-web.tgz", "w:gz") as package:
            for name, _ in static.RUNTIME.values():
                member = tarfile.TarInfo(f"package/dist/{name}")
                member.size = 4
                package.addfile(member, io.BytesIO(b"evil"))
        return Npm()

    monkeypatch.setattr("subprocess.run", pack)
    monkeypatch.setattr("shutil.which", lambda name: "npm")
    with pytest.raises(FailureError, match="is not the file that is known"):
        static.write_static(world, tmp_path / "site", "npm")
    assert not (tmp_path / "site").exists(), "nothing is half-written"
