"""Downloads against a local server: a host that answers 404, one cut short, one with other content, and a good one."""

import functools
import gzip
import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from vaelab.data import sources
from vaelab.data.download import download
from vaelab.errors import FailureError

CONTENT = b"some images " * 1000
SHA256 = {"images": hashlib.sha256(CONTENT).hexdigest(), "labels": hashlib.sha256(CONTENT[:50]).hexdigest()}


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path.startswith("/short/"):
            body = Path(self.directory, "good", Path(self.path).name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            return
        if self.path.startswith("/nonsense/"):
            self.wfile.write(b"no status line\r\n\r\n")
            self.close_connection = True
            return
        super().do_GET()


@pytest.fixture
def server(tmp_path):
    root = tmp_path / "www"
    (root / "good").mkdir(parents=True)
    (root / "wrong").mkdir()
    (root / "garbage").mkdir()
    for name, content in (("images", CONTENT), ("labels", CONTENT[:50])):
        (root / "good" / f"{name}.gz").write_bytes(gzip.compress(content))
        (root / "wrong" / f"{name}.gz").write_bytes(gzip.compress(b"something else"))
        (root / "garbage" / f"{name}.gz").write_bytes(b"<html>moved</html>")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(root))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("first", ["nowhere", "short", "wrong", "garbage", "nonsense"])
def test_a_bad_host_is_passed_over_for_a_good_one(server, tmp_path, first):
    download(tmp_path / "cache", [f"{server}/{first}", f"{server}/good"], SHA256, timeout=5)
    assert gzip.decompress((tmp_path / "cache" / "images.gz").read_bytes()) == CONTENT
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["images.gz", "labels.gz"], (
        "no temporary file stays"
    )


@pytest.mark.parametrize(
    ("host", "reason"),
    [("nowhere", "HTTP 404"), ("short", "cut short"), ("wrong", "wrong content"), ("garbage", "gzipped"),
     ("nonsense", r"\(no status line\)")],
)  # fmt: skip
def test_without_a_good_host_every_failure_is_named_and_nothing_is_left(server, tmp_path, host, reason):
    with pytest.raises(FailureError, match=reason) as error:
        download(tmp_path / "cache", [f"{server}/{host}", "http://127.0.0.1:9"], SHA256, timeout=5)
    assert f"{server}/{host}/images.gz" in str(error.value)
    assert "127.0.0.1:9" in str(error.value)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    download(tmp_path, [f"{server}/good"], SHA256, timeout=5)
    before = (tmp_path / "images.gz").stat().st_mtime_ns
    download(tmp_path, ["http://127.0.0.1:9"], SHA256, timeout=5)
    assert (tmp_path / "images.gz").stat().st_mtime_ns == before


def test_a_damaged_file_is_fetched_again(server, tmp_path):
    download(tmp_path, [f"{server}/good"], SHA256, timeout=5)
    (tmp_path / "images.gz").write_bytes(b"damaged")
    download(tmp_path, [f"{server}/good"], SHA256, timeout=5)
    assert gzip.decompress((tmp_path / "images.gz").read_bytes()) == CONTENT


def test_an_interrupted_download_is_completed(tmp_path, monkeypatch):
    """A cache with some of the files is not an error: the missing ones are asked for."""
    cache = tmp_path / "cache" / "mnist"
    cache.mkdir(parents=True)
    (cache / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b""))
    monkeypatch.delenv("VAELAB_DATA", raising=False)
    monkeypatch.setattr(sources, "_cache", lambda name: cache)
    asked = []

    def fetch(folder):
        asked.append(folder)
        raise FailureError("no host")

    monkeypatch.setattr(sources, "download", fetch)
    with pytest.raises(FailureError, match="incomplete"):
        sources.mnist()
    assert asked == [cache]


def test_mnist_that_cannot_be_had_says_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("VAELAB_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(sources, "_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(sources, "download", functools.partial(download, hosts=["http://127.0.0.1:9"], timeout=1))
    with pytest.raises(FailureError, match="--data digits needs no download") as error:
        sources.mnist()
    assert str(tmp_path / "nothing" / "mnist") in str(error.value)
    assert str(tmp_path / "cache" / "mnist") in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_not_mnist_are_not_called_mnist(tmp_path, monkeypatch):
    import numpy as np

    from test_readers import idx_bytes

    folder = tmp_path / "mnist"
    folder.mkdir()
    monkeypatch.setenv("VAELAB_DATA", str(tmp_path))
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        (folder / name).write_bytes(idx_bytes(np.zeros((3, 28, 28), np.uint8)))
    with pytest.raises(FailureError, match="lacks train-labels"):
        sources.mnist()
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        (folder / name).write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    with pytest.raises(FailureError, match="wrong SHA-256"):
        sources.mnist()
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((3, 28, 28), np.uint8))[:-1])
    with pytest.raises(FailureError, match="cut short"):
        sources.mnist()
