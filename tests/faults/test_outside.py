"""What comes from outside and is broken: a model hub that is away, slow or wrong, files of a model that are not whole.
It is refused before anything is measured, or is a row with its reason; never a defect, never a hang."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import subprocess
import sys
import threading

import pytest

from harness.errors import UsageError
from harness.run.executors.disk import Disk
from harness.run.executors.local import LocalExecutor
from harness.run.plan import make_plan
from harness.run.runner import run_plan
from harness.run.site import site_of


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as its server was told to; what asks whether there is any hub at all gets an answer."""

    def do_GET(self):
        kind = self.server.kind
        root = self.path in ("", "/")
        if kind == "slow" or (kind == "slow files" and not root):
            self.server.ended.wait()
            return
        codes = {"failing": 500, "missing": 404, "gated": 403, "busy": 429}
        body = {"wrong": b"<html>Please log in</html>", "cut": b'{"model_type": "llama", '}.get(kind, b"{}")
        self.send_response(200 if root else codes.get(kind, 200))
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", '"b"')
        self.send_header("Content-Length", str(len(body) + (1000 if kind == "cut" and not root else 0)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, form, *arguments):
        """Nothing."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function that puts up a hub of a kind and has every process ask it."""
    with contextlib.ExitStack() as stack:

        def put_up(kind):
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
            server.kind, server.ended, server.daemon_threads = kind, threading.Event(), True
            address = f"http://127.0.0.1:{server.server_port}"
            if kind == "away":
                server.server_close()
            else:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                stack.callback(server.server_close)
                stack.callback(server.shutdown)
                stack.callback(server.ended.set)
            for name, value in {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}.items():
                monkeypatch.setenv(name, value)
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY", "ALL_PROXY"):
                monkeypatch.delenv(name, raising=False)
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")

        yield put_up


QUICK = ["away", "wrong", "cut"]
LONG = ["failing", "missing", "gated", "busy", "slow", "slow files"]
KINDS = [*QUICK, *(pytest.param(kind, marks=pytest.mark.faults) for kind in LONG)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hub_that_has_no_model_for_us(kind, hub, tmp_path, command):
    """The model is named with the remedy, before any process is started; a hub that is slow still waits by then."""
    hub(kind)
    words = [
        "run",
        str(tmp_path / "small.toml"),
        "--model",
        "somebody/some-model",
        "--runs-dir",
        str(tmp_path / "runs"),
    ]
    command()
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", *words], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "somebody/some-model" in done.stderr


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["away", "failing", "missing", "wrong", "slow", "slow files"])
def test_a_hub_that_has_no_data_for_us(kind, hub, tmp_path, command):
    """As its model, from the tokenising process."""
    hub(kind)
    command()
    words = ["run", str(tmp_path / "small.toml"), "--data", "somebody/some-data", "--runs-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", *words], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "somebody/some-data" in done.stderr


# --- files of a model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with a small model and its tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    from harness.models import catalogue
    from harness.trial.data.tokenizers import _byte_tokenizer

    _byte_tokenizer(catalogue.resolve("tiny-llama"), 300).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved, tmp_path):
    """A function that copies the model and cuts, spoils or empties one of its files."""
    import shutil

    def copy(name, how):
        folder = tmp_path / "broken"
        shutil.copytree(saved, folder)
        content = (folder / name).read_bytes()
        spoilt = {"cut": content[: len(content) // 2], "empty": b"", "spoilt": b"\xff" * 64 + content[64:]}
        (folder / name).write_bytes(spoilt[how])
        return folder

    return copy


HOW = ["cut", "empty", "spoilt"]


@pytest.mark.parametrize("how", ["cut", *(pytest.param(how, marks=pytest.mark.faults) for how in HOW[1:])])
def test_a_tokenizer_that_is_not_whole_is_refused(how, broken, small_study, tmp_path):
    """By the tokenising process, which is real: the model is named, and nothing is measured."""
    workload = dataclasses.replace(small_study.workload, model=str(broken("tokenizer.json", how)))
    local = LocalExecutor()
    local._disk = Disk(tmp_path)
    try:
        with pytest.raises(UsageError, match=r"its tokenizer cannot be loaded"):
            local.prepare_tokens(workload)
    finally:
        local.close()


@pytest.mark.faults
@pytest.mark.parametrize("how", HOW)
def test_weights_that_are_not_whole_are_a_row_each(how, broken, small_study, tmp_path):
    """Crashed in their building, with what the library says; the processes are real."""
    workload = dataclasses.replace(small_study.workload, model=str(broken("model.safetensors", how)))
    protocol = dataclasses.replace(small_study.protocol, replicates=1)
    study = dataclasses.replace(small_study, workload=workload, protocol=protocol)
    plan = make_plan(study, phases=("train",))
    local = LocalExecutor()

    class Quiet:
        trial_phase = trial_ended = staticmethod(lambda *_: None)

    try:
        local.start(tmp_path, 1)
        local.hello()
        site = site_of(workload, local.prepare_tokens(workload), "cpu")
        found = run_plan(plan, {"": local}, site, save=lambda record: None, watcher=Quiet())
    finally:
        local.close()
    assert {(record.status, record.failure.phase) for record in found.records} == {("crashed", "build")}
    assert all("Traceback" in record.failure.traceback for record in found.records)
