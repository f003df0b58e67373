"""Doors of what is trained on, and of who trains: tables, saved data sets, chat templates, scripts and their words.

What a library of another language reads is read in a fork, as the commands read it in a process of its own: its death
is a refusal there, and here as well.
"""

from __future__ import annotations

import io
import json
import os
import random
import socket
import tempfile
from collections.abc import Callable
from contextlib import chdir
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import hostile
import hostile_models
from hostile_door import RefusedError

from harness.commands.wrap import read_requirements
from harness.errors import UsageError
from harness.records import codec
from harness.records.forms import flaw_of
from harness.run.executors import Place, WorkerLostError
from harness.run.executors.channel import Channel
from harness.run.executors.script import TOKENS
from harness.run.executors.script_worker import ScriptWorker
from harness.run.plan import make_plan
from harness.run.site import begin_record, request_of, site_of
from harness.studies.script_study import study_of_command
from harness.studies.workload import Workload
from harness.trial.data import apart, look
from kernels_check.visible import make_visible

ROWS = [{"instruction": f"say {n}", "context": "", "response": f"it is {n}"} for n in range(6)]
CHATS = [
    {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}]} for n in range(6)
]


# --- tables -----------------------------------------------------------------------------------------------------------


def tables() -> list[bytes]:
    """A few records as CSV."""
    return [("instruction,context,response\n" + "".join(f'"say {n}",,"it, is {n}"\n' for n in range(6))).encode()]


def enter_table(folder: Path, content: bytes) -> str:
    """A file of CSV."""
    return _read(folder / "records.csv", content)


@cache
def parquets() -> list[bytes]:
    """A few records as Parquet, packed in several ways."""
    import pyarrow
    from pyarrow import parquet

    ways = (
        (ROWS, {}), (CHATS, {}), (ROWS, {"compression": "none", "use_dictionary": False}),
        (ROWS, {"compression": "zstd", "data_page_version": "2.0"}), (CHATS, {"write_page_checksum": True}),
    )  # fmt: skip
    found = []
    for rows, way in ways:
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, **way)
        found.append(buffer.getvalue())
    return found


def enter_parquet(folder: Path, content: bytes) -> str:
    """A file of Parquet."""
    path = folder / "records.parquet"
    path.write_bytes(content)
    return _look_in_fork(path)


@cache
def saved_sets() -> list[bytes]:
    """Data sets as `datasets` saves them: the files of a folder, by their names."""
    import datasets

    datasets.disable_progress_bars()
    found = []
    for rows in (ROWS, CHATS):
        with tempfile.TemporaryDirectory() as folder:
            datasets.Dataset.from_list(rows).save_to_disk(f"{folder}/x")
            files = {path.name: path.read_bytes().decode("latin-1") for path in sorted(Path(folder, "x").iterdir())}
            found.append(json.dumps(files).encode())
    return found


def spoil_saved(source: random.Random, content: bytes) -> bytes:
    """One of its files, as a document or by its bytes."""
    files = json.loads(content)
    name = source.choice(sorted(files))
    raw = files[name].encode("latin-1")
    as_document = name.endswith(".json") and source.random() < 0.7
    spoilt = hostile.spoil_json(source, raw) if as_document else hostile.spoil_bytes(source, raw)
    return json.dumps(files | {name: spoilt.decode("latin-1")}).encode()


def enter_saved(folder: Path, content: bytes) -> str:
    """A folder with these files."""
    path = folder / "set"
    path.mkdir()
    for name, text in json.loads(content).items():
        (path / name).write_bytes(text.encode("latin-1"))
    return _look_in_fork(path)


def _read(path: Path, content: bytes) -> str:
    from harness.trial.data.records import read_records

    path.write_bytes(content)
    records, label = read_records(Workload(data=str(path)))
    assert all(isinstance(text, str) for record in records for text in record.values())
    return make_visible(label)


def _look_in_fork(path: Path) -> str:
    """What a process of its own finds, without the seconds that its libraries take."""
    request = codec.dumps(Workload(data=str(path), held_out_records=1))
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.write(said.fileno(), look.answer(request).encode())
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        said.seek(0)
        found = apart.read_answer(os.waitstatus_to_exitcode(status), said.read(), b"", "data 'x'")
    return make_visible(found)


# --- chat templates ---------------------------------------------------------------------------------------------------

TEMPLATES = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }};"
    "{% endgeneration %}{% else %}{{ m['content'] | trim }}{% endif %}{% endfor %}",
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
)
PIECES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 3000000000 }}",
    "{{ 10 ** 100000000 }}", "{{ 'a'.ljust(3000000000) }}", "{{ '%3000000000d' % 3 }}", "{{ 3 }}", "{{ x.y }}", "{{",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% if 1 %}" * 2000, "{{ " + "(" * 5000, "\x1b[2J", "\ud800",
    "{{ raise_exception('\x1b[2J') }}", "{{ ''.__class__ }}", "{% generation %}", "{% endgeneration %}", "{% raw %}",
    "{{ messages }}", "{{ messages[99] }}", "{% set messages = [] %}", "{% include '/etc/passwd' %}", "{{ namespace }}",
    "{{ messages | tojson }}", "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ 1 / 0 }}",
    "{{ 'a' | center(999999999) }}", "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "{{ strftime_now }}",
)  # fmt: skip


def templates() -> list[bytes]:
    """Templates as models have them."""
    hostile_models.tokenizer_files()  # what it loads is loaded before the processes are forked
    _tokenizer()
    return [template.encode() for template in TEMPLATES]


def spoil_template(source: random.Random, content: bytes) -> bytes:
    """Pieces put in, or the bytes."""
    if source.random() < 0.3:
        return hostile.spoil_bytes(source, content)
    text = content.decode()
    for _ in range(source.choice((1, 1, 2))):
        at = source.choice((0, len(text), source.randint(0, len(text))))
        text = text[:at] + source.choice(PIECES) + text[at + source.choice((0, 0, 1, 8)) :]
    return text.encode("utf-8", errors="surrogatepass")


@cache
def _tokenizer():
    from harness.models import catalogue, shapes
    from harness.trial.data.tokenizers import load_tokenizer

    source = catalogue.resolve("tiny-llama")
    return load_tokenizer(source, vocab_size=shapes.shape(source).vocab_size)[0]


def enter_template(folder: Path, content: bytes) -> str:
    """The template of a tokenizer: conversations are written by it, and their answers found."""
    from harness.trial.data.chat import ChatTemplate
    from harness.trial.data.messages import read_conversation

    tokenizer = _tokenizer()
    tokenizer.chat_template = content.decode("utf-8", errors="replace")
    template = ChatTemplate(tokenizer, "mine")
    for row in CHATS[:2]:
        conversation = read_conversation(row["messages"], "line 1", "messages")
        template.answers(conversation, template.text(conversation))
        template.prompt(conversation)
    return ""


# --- scripts ----------------------------------------------------------------------------------------------------------

STEP = {
    "number": 1, "step_time_s": 0.1, "cpu_time_s": 0.1, "loss": 2.0, "real_tokens": 64, "padded_tokens": 64,
    "checks": [{"path": "base.bits", "required": 4, "observed": 4, "status": "active", "reason": "seen"}],
}  # fmt: skip
BEGUN = {
    "pid": 1, "source": "loop", "planned_steps": 99, "trainable_dtypes": {"float32": 8}, "ranks": 1, "threads": 1,
    "required": {"base.bits": 4}, "memory": {"host_peak_load_bytes": 1 << 20},
}  # fmt: skip
STEPS = 9
"""Until its times are steady, and one that is timed."""
COMMANDS = ("build", "verify", "warm_up", "turn", "finish_training")


def talks() -> list[bytes]:
    """What scripts say: of a training that is stopped when it has taken its steps, of one that ends before, of one that
    breaks off."""
    steps: list[dict[str, object]] = [{"steps": [STEP]}] * STEPS
    ends = (
        [{"peaks": {"host_peak_train_bytes": 1 << 20}}, {"end": {"error": None}, "steps": []}],
        [{"end": {"error": None}, "steps": []}],
        [{"end": {"error": "ValueError", "message": "x", "traceback": "Traceback"}, "steps": []}],
        [{"fault": "a second training began"}],
    )
    return ["\n".join(map(json.dumps, [{"begin": BEGUN}, *steps, *end])).encode() for end in ends]


def enter_talk(folder: Path, content: bytes) -> str:
    """The words of a script's process, whose trial is asked all that a trial is asked."""
    ours, theirs = socket.socketpair()
    with theirs, ours:
        theirs.settimeout(0.0)
        try:
            theirs.sendall(content + b"\n")
        except BlockingIOError:
            raise RefusedError from None
        theirs.shutdown(socket.SHUT_WR)
        channel = Channel(ours)
        process = SimpleNamespace(
            first_word=channel.receive, hear=channel.receive, tell=lambda message: None, age_s=lambda: 1.0, closed=True,
            kill=lambda: None, close=lambda: None, ended=lambda grace_s=0.0: -40,
        )  # fmt: skip
        return _ask_all(process, folder)


@cache
def _planned():
    return make_plan(study_of_command("python train.py"), phases=("train",), interleaving="lockstep")


def _ask_all(process: object, folder: Path) -> str:
    plan = _planned()
    slot = plan.slots[0]
    site = site_of(plan.study.workload, TOKENS, "cpu")
    request = request_of(plan, slot, site, Place(scratch=str(folder), log_path=str(folder / "log")))
    worker = ScriptWorker(lambda asked: process)
    worker.ask("prepare", slot.trial, 1.0, request=codec.to_json(request))
    record = begin_record(slot, "ok")
    for command in COMMANDS:
        arguments = {"turn": {"steps": 1}, "finish_training": {"steps": 1}}.get(command, {})
        try:
            record = record.merged(worker.ask(command, slot.trial, 1.0, **arguments))
        except WorkerLostError as lost:
            raise RefusedError(make_visible(str(lost))) from None
        if record.status != "ok":
            break
    if flaw := flaw_of(record):
        raise RefusedError(make_visible(flaw))
    codec.dumps(record).encode("utf-8", errors="replace")
    return make_visible(record.failure.message if record.failure else "")


STUDY = b"""title = "t"
notes = ["x"]
[protocol]
replicates = 3
turns = 4
step_timeout_s = 60
[workload]
threads = 1
[requirements]
"base.bits" = 4
[[variant]]
name = "a"
command = "python train.py --r 64"
cwd = "."
env = { A = "1", B = "2" }
[[variant]]
name = "b"
command = "python train.py"
"""


def in_folder_of_a_script(enter: Callable[[Path, bytes], str]) -> Callable[[Path, bytes], str]:
    """The same where a script lies."""

    def entered(folder: Path, content: bytes) -> str:
        (folder / "train.py").touch()
        with chdir(folder):
            return enter(folder, content)

    return entered


PATHS = ("base.bits", "attention.backend", "lora.learning", "mode", "base.frozen")
REQUIRED = (
    "base.bits", "no.such", "", "mode", "=", "==", "4", "8", "true", "false", "train",
    "True", "flash", "null", "NaN", "Infinity", "-1", "1e999", "9" * 5000, "[" * 3000, "[4]", "{}", '"4"', "\x1b[2J",
    "é", "\udcff", "4.0", "1e400", " 4", "0x4", "[[4]]", '{"a": 4}', "--",
)  # fmt: skip


def spoil_requirement(source: random.Random, content: bytes) -> bytes:
    """A path and a value, put together."""
    if source.random() < 0.1:
        return hostile.spoil_bytes(source, content)
    path = source.choice(PATHS if source.random() < 0.7 else REQUIRED)
    return f"{path}={source.choice(REQUIRED)}".encode("utf-8", errors="surrogateescape")


def enter_requirement(folder: Path, content: bytes) -> str:
    """A word of `--require`."""
    try:
        found = read_requirements([content.decode("utf-8", errors="surrogateescape")])
    except UsageError as error:
        raise RefusedError(make_visible(str(error))) from None
    return make_visible(codec.dumps(found))
