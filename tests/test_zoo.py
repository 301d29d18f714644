"""The model zoo: downloads into Detectron2's cache, and which weights ask for them."""

import hashlib
import http.server
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from detectors import zoo
from errors import InputError
from models import MODELS

CONFIG = "COCO-Detection/retinanet_R_50_FPN_3x"
BODY = bytes(range(256)) * 1024


class Zoo(http.server.BaseHTTPRequestHandler):
    """Serves BODY below /detectron2, and answers wrongly below other folders."""

    def do_GET(self):
        self.server.requests.append(self.path)
        kind = self.path.split("/")[1]
        if kind == "missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[: len(BODY) // 2] if kind == "truncated" else BODY)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A running server, with a cache of its own and BODY's md5 in the config's name."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    digest = hashlib.md5(BODY).hexdigest()[:6]
    monkeypatch.setitem(zoo.ZOO, CONFIG, f"1/model_final_{digest}.pkl")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Zoo)
    server.requests = []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def cached_files(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_zoo_download_and_cache(tmp_path, server):
    path = zoo.zoo_checkpoint(CONFIG, f"{server.address}/detectron2")
    expected = f"cache/detectron2/{CONFIG}/{zoo.ZOO[CONFIG]}"
    assert path == tmp_path / expected
    assert path.read_bytes() == BODY
    assert cached_files(tmp_path) == [path]
    assert zoo.zoo_checkpoint(CONFIG, f"{server.address}/detectron2") == path
    assert len(server.requests) == 1


def test_zoo_replaces_a_damaged_cached_file(tmp_path, server):
    path = zoo.zoo_checkpoint(CONFIG, f"{server.address}/detectron2")
    path.write_bytes(BODY[:100])
    assert zoo.zoo_checkpoint(CONFIG, f"{server.address}/detectron2").read_bytes() == BODY


def test_zoo_finds_what_detectron2_downloaded(tmp_path, server):
    file_io = pytest.importorskip("iopath.common.file_io")
    manager = file_io.PathManager()
    manager.register_handler(file_io.HTTPURLHandler())
    local = manager.get_local_path(f"{server.address}/detectron2/{CONFIG}/{zoo.ZOO[CONFIG]}")
    assert zoo.zoo_checkpoint(CONFIG, f"{server.address}/detectron2") == Path(local)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("missing", "HTTP Error 404"),
        ("truncated", f"the connection ended after {len(BODY) // 2} of {len(BODY)} bytes"),
    ],
)
def test_zoo_failed_download_leaves_nothing(tmp_path, server, folder, message):
    with pytest.raises(zoo.CheckpointUnavailable, match=message) as caught:
        zoo.zoo_checkpoint(CONFIG, f"{server.address}/{folder}")
    assert server.address in str(caught.value)
    assert cached_files(tmp_path) == []


def test_zoo_wrong_md5(tmp_path, server, monkeypatch):
    monkeypatch.setitem(zoo.ZOO, CONFIG, "1/model_final_123456.pkl")
    with pytest.raises(zoo.CheckpointUnavailable, match="instead of 123456"):
        zoo.zoo_checkpoint(CONFIG, f"{server.address}/detectron2")
    assert cached_files(tmp_path) == []


def test_zoo_connection_refused(tmp_path, server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody can connect
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/detectron2"
        with pytest.raises(zoo.CheckpointUnavailable, match="refused"):
            zoo.zoo_checkpoint(CONFIG, address)
    assert cached_files(tmp_path) == []


def test_zoo_server_that_says_nothing(tmp_path, server):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/detectron2"
        with pytest.raises(zoo.CheckpointUnavailable, match="timed out"):
            zoo.zoo_checkpoint(CONFIG, address, timeout=0.1)
    assert cached_files(tmp_path) == []


def test_zoo_cache_that_cannot_be_written(tmp_path, server, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "file"))
    with pytest.raises(zoo.CheckpointUnavailable, match="FVCORE_CACHE"):
        zoo.zoo_checkpoint(CONFIG, f"{server.address}/detectron2")


def test_zoo_unknown_config():
    with pytest.raises(InputError, match="retinanet_R_50_FPN_3x"):
        zoo.zoo_checkpoint("COCO-Detection/none")


def test_zoo_default_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("FVCORE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if sys.platform != "win32":
        assert zoo.cache_dir() == tmp_path / ".torch" / "iopath_cache"


@pytest.mark.detectron2
def test_zoo_has_detectron2s_addresses():
    model_zoo = pytest.importorskip("detectron2.model_zoo")
    for config, suffix in zoo.ZOO.items():
        url = f"{zoo.ZOO_URL}/{config}/{suffix}"
        assert model_zoo.get_checkpoint_url(f"{config}.yaml") == url


# What `--weights` asks for

RETINANET = MODELS["testRetinaNet"]


def test_auto_does_without_the_model_zoo(offline):
    zoo.download_zoo([RETINANET], "auto")


def test_zoo_does_not(offline):
    with pytest.raises(InputError, match=r"^cannot download https://.*model_final_5bd44e.pkl"):
        zoo.download_zoo([RETINANET], "zoo")


@pytest.mark.parametrize("weights", ["synthetic", "mine.pth"])
def test_other_weights_do_not_ask_the_network(offline, monkeypatch, weights):
    monkeypatch.setattr(zoo, "zoo_checkpoint", lambda config: pytest.fail(config))
    zoo.download_zoo([RETINANET], weights)


@pytest.mark.parametrize("weights", ["auto", "zoo"])
def test_models_that_share_a_checkpoint_ask_for_it_once(monkeypatch, weights):
    asked = []
    monkeypatch.setattr(zoo, "zoo_checkpoint", asked.append)
    zoo.download_zoo(MODELS.values(), weights)
    assert sorted(asked) == sorted(zoo.ZOO)


def test_a_checkpoint_of_the_users_has_a_digest(tmp_path):
    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    first.write_bytes(b"weights")
    second.write_bytes(b"others")
    assert zoo.checkpoint_digest(str(first)) == hashlib.sha256(b"weights").hexdigest()[:16]
    assert zoo.checkpoint_digest(str(first)) != zoo.checkpoint_digest(str(second))
    assert [zoo.checkpoint_digest(name) for name in zoo.NAMED_WEIGHTS] == [None, None, None]


def test_it_imports_no_pytorch():
    code = "import sys, detectors.zoo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(zoo.__file__).parent.parent, check=True)
