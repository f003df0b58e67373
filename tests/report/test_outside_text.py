"""Text from outside acts on no terminal, and credentials in it are repeated nowhere: every door, every rendering."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from kernels_check.__main__ import main as check_kernels
from kernels_check.terminal import escape_control_chars
from lorameter.cli import main
from lorameter.errors import InvalidRunError, UsageError, redact
from lorameter.records import codec
from lorameter.records.os_errors import failed_record
from lorameter.records.record import Notice
from lorameter.records.store import read_manifest
from lorameter.report.annotations import annotation, gate_annotations
from lorameter.report.comparison import describe_attribution, describe_gate
from lorameter.report.live import LiveDisplay
from lorameter.report.render_markdown import markdown_of
from lorameter.report.terminal import console_for, text_of
from lorameter.run.workers import sides
from lorameter.studies.study_file import load_study
from lorameter.verdicts.ab import attribution_of, report_of
from lorameter.verdicts.gate import Policy, gate_document, judge

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp"
SECRET = "hunter2"
URLS = (
    f"https://user:{SECRET}@example.org/peft-1.0-py3-none-any.whl",
    f"git+https://{SECRET}@example.org/peft.git",
    f"git+ssh://git:{SECRET}@example.org/peft.git@v1",
    f"https://user:p@{SECRET}@example.org/peft.whl",
    f"https://example.org/peft.whl?sig={SECRET}&t=1",
    f"http://{SECRET}:{SECRET}@proxy:3128",
    f"https://user:p'{SECRET}@example.org/peft.whl",
    f"https://example.org/peft.whl?a='&sig='{SECRET}",
    f"https://user:p#{SECRET}@example.org/peft.whl",
    f"https://user:p/{SECRET}@example.org/peft.whl",
    f"//user:{SECRET}@example.org/peft.whl",
    f"user:{SECRET}@example.org:peft.git",
    f"https:user:{SECRET}@example.org/peft.whl",
)


def acts(text: str) -> bool:
    return escape_control_chars(text) != text


@pytest.mark.parametrize("url", URLS)
def test_a_credential_in_an_address_is_left_out(url):
    """Users, passwords, tokens and queries; host and path stay, so that one knows what is meant."""
    assert SECRET not in redact(f"could not reach {url}: refused")
    assert redact(url).split("@")[-1].split("?")[0] == url.split("@")[-1].split("?")[0] or "ssh" in url
    for kind in (UsageError, InvalidRunError):
        assert SECRET not in str(kind(f"side {url!r}: no"))


def test_what_is_no_address_stays():
    """A requirement, a decorated name, an address without a user, a revision behind a path, a digest, a document."""
    for text in (
        "peft==0.20.0 torch>=2", "a@b.c", "https://example.org/x#egg=peft", "peft @ file:///tmp/peft.whl",
        "peft @ git+https://example.org/peft.git@v1", "https://example.org:8443/peft.git@v1", "http://[::1]:80/x@y",
        "image:tag@sha256:ab", '{"a":"b@c"}', "said at 12:30 @ noon: a @ b",
    ):  # fmt: skip
        assert redact(text) == text


@pytest.mark.parametrize(
    "line",
    [
        ["report", "--sort", URLS[0], "x"],
        ["run", "lora-or-qlora", f"--nope={URLS[0]}"],
        ["run", "lora-or-qlora", f"--replicates={URLS[1]}"],
        ["list", URLS[0]],
        [URLS[0]],
    ],
)
def test_what_the_parser_refuses_is_repeated_without_a_credential(line, capsys):
    """Options of another name, values out of their range and commands that there are none of."""
    with pytest.raises(SystemExit):
        main(line)
    said = capsys.readouterr().err
    assert "example.org" in said or "unknown option --nope." in said  # of which no value is repeated
    assert SECRET not in said


def test_a_studys_words_hold_no_credential(tmp_path):
    """Its title and notes are shown with every result, and written down."""
    study = tmp_path / "mine.toml"
    study.write_text(
        f'title = """see\n{URLS[0]}"""\nnotes = ["from {URLS[4]}"]\n[axes]\nr = [8, 16]\n[[claim]]\nid = "c"\n'
        f'says = "as {URLS[0]}"\noriginal = "as {URLS[0]}"\n'
        '[[claim.parts]]\nrule = "trend-up"\naxis = "r"\nmetric = "step_time_s"\n'
    )
    read = load_study(str(study))
    assert read.title == "see https://***@example.org/peft-1.0-py3-none-any.whl"
    assert SECRET not in repr(read)


@pytest.mark.parametrize("url", URLS[:5])
def test_a_side_holds_no_credential(url, write_run, capsys):
    """Neither the manifest nor what is drawn of it: text, document, Markdown, annotations."""
    side = sides.name_side(f"peft @ {url}", Path()).to_json()
    assert SECRET not in str(side)
    path = write_run("ab", {"plain": [1.0] * 5, "nf4": [1.0] * 5})
    manifest = read_manifest(path)
    told = side | {"worker": "1", "facts": {"packages": {}}}
    document = codec.to_json(manifest) | {"sides": {"base": told, "candidate": told}}
    (path / "manifest.json").write_text(json.dumps(document))
    assert main(["report", str(path)]) in (0, 4, 5)
    for form in (["--json"], ["--markdown"], ["--format", "github"], ["--html", str(path / "page.html")]):
        assert main(["report", str(path), *form]) in (0, 4, 5)
    assert SECRET not in (path / "page.html").read_text()
    assert SECRET not in "".join(capsys.readouterr()) + (path / "manifest.json").read_text()


def test_what_installs_gets_the_credential_and_what_is_told_does_not(tmp_path, monkeypatch, capsys):
    """pip reads the address as it is, from a file that nobody else may read; its command line, which everybody on the
    machine sees, git's, progress and a failure's message hold none."""
    requirement = f"peft@ {URLS[0]}"
    seen: list[list[str]] = []
    read: list[tuple[str, int]] = []

    def run(command, requirements, report):
        seen.append(list(command))
        report(f"Collecting {requirement}")
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        else:
            listed = Path(command[command.index("--requirement") + 1])
            read.append((listed.read_text(), listed.stat().st_mode & 0o777))
            raise UsageError(f"ab: an environment with {requirement} could not be made")

    monkeypatch.setattr("lorameter.run.workers.environment._run", run)
    monkeypatch.setattr("lorameter.run.workers.environment.site_packages", lambda python: tmp_path)
    monkeypatch.setattr(sides, "_commit", lambda spec, repository: pytest.fail("git was given the address"))
    with (
        pytest.raises(UsageError) as caught,
        sides.open_side(sides.name_side(f"peft @ {URLS[0]}", tmp_path), repository=tmp_path, cache=tmp_path / "cache"),
    ):
        pass
    ((text, mode),) = read
    assert text.endswith(f"@ {URLS[0]}\n")
    assert mode == 0o600
    assert len(seen) == 2
    assert SECRET not in str(seen)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text()]
    shown = "".join(capsys.readouterr())
    assert "example.org" in shown
    assert SECRET not in shown + str(caught.value)


def test_an_exception_of_a_trial_holds_no_credential(capsys):
    """It is written to the log and into the record."""
    try:
        raise RuntimeError(f"cannot reach {URLS[5]}")
    except RuntimeError as error:
        failure = failed_record(error, "build").failure
    assert failure is not None
    assert SECRET not in failure.message + failure.traceback + capsys.readouterr().err


# --- terminals --------------------------------------------------------------------------------------------------------


def hostile_run(write_run, *, sides_too=False):
    """A run in which everything that others wrote holds an escape sequence."""
    path = write_run(
        "hostile",
        {"plain": [1.0] * 5, "nf4": [1.1] * 5},
        change=lambda record: record.replaced(
            notices=(Notice(code=f"n{ESCAPE}", message=f"m{ESCAPE}", remedy=f"r{ESCAPE}"),),
            log=f"logs/{ESCAPE}",
        ),
    )
    document = codec.to_json(read_manifest(path))
    document["study"] |= {"title": f"a [/b] c {ESCAPE}", "notes": [f"note {ESCAPE}"]}
    document |= {"run": f"hostile{ESCAPE}", "stopped": f"why {ESCAPE}", "why": ESCAPE}
    document["provenance"] |= {"device_name": f"GPU [/x] {ESCAPE}"}
    document["tokens"] = {"data": f"file{ESCAPE}.jsonl"}
    if sides_too:
        side = {"label": f"[/b]{ESCAPE}", "worker": ESCAPE, "facts": {"packages": {f"p{ESCAPE}": "1"}}}
        document["sides"] = {"base": side, "candidate": side | {"facts": {"packages": {}}}}
    (path / "manifest.json").write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("line", ["report {}", "claims {}", "compare {} {}", "gate {} {}", "list runs", "accept {}"])
@pytest.mark.parametrize("form", [" --json", " --verbose", " --format github"])
def test_no_command_shows_it_raw(line, form, write_run, capsys):
    """Titles, notices, notes, names of runs, devices and files; on standard output and on standard error."""
    path = hostile_run(write_run)
    form = form if form == " --json" or line not in ("list runs", "accept {}") else ""
    words = [word.replace("{}", str(path)) for word in (line + form).split()]
    assert main([*words, "--runs-dir", str(path.parent)]) in (0, 1, 2, 3, 4, 5)
    out, errors = capsys.readouterr()
    assert not acts(out)
    assert not acts(errors)


def test_no_form_of_an_ab_shows_it_raw(write_run):
    """Labels of sides and names of packages."""
    from lorameter.records.store import read_run

    path = hostile_run(write_run, sides_too=True)
    run = read_run(str(path), path.parent)
    result = judge(report_of(run), Policy())
    shown = text_of(describe_attribution(attribution_of(run), run), width=100, coloured=False)
    shown += markdown_of(describe_gate(result)) + gate_annotations(result)
    shown += annotation("error", ESCAPE, f"{ESCAPE}\n::error::x")
    assert not acts(shown)
    json.dumps(gate_document(result) | {"attribution": codec.to_json(attribution_of(run))})


@pytest.mark.parametrize(
    "line",
    [["report", ESCAPE], [ESCAPE], ["run", f"--{ESCAPE}"], ["run", ESCAPE], ["list", ESCAPE], ["report", "x", ESCAPE],
     ["run", "lora-or-qlora", "--model", ESCAPE], ["model", "fetch", ESCAPE],
     ["run", "x", "--runs-dir", f"/dev/null/{ESCAPE}"]],
)  # fmt: skip
def test_no_refusal_shows_it_raw(line, capsys, tmp_path, monkeypatch):
    """Neither ours nor argparse's, which repeat what was typed; scripts type what files are called."""
    monkeypatch.chdir(tmp_path)
    try:
        code = main(line)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    errors = capsys.readouterr().err
    assert errors
    assert not acts(errors)


@pytest.mark.parametrize("arguments", [["trace", ESCAPE], [ESCAPE], ["trace", "x", ESCAPE]])
def test_kernels_check_shows_it_raw_neither(arguments, capsys):
    """Its refusals and argparse's."""
    try:
        code = check_kernels(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert not acts(capsys.readouterr().err)


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_recording_shows_it_raw_neither(form, tmp_path, capsys):
    """Names of kernels come from whoever made the recording, and are no markup either."""
    path = tmp_path / "kernels.json"
    events = [
        {"ph": "X", "cat": "kernel", "name": f"[/b] {ESCAPE}", "ts": n, "dur": 1, "args": {"stream": 7, "device": 0}}
        for n in range(3)
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    assert check_kernels(["trace", str(path), *form]) == 0
    assert not acts("".join(capsys.readouterr()))


def test_an_unexpected_error_is_shown_visibly(monkeypatch, capsys):
    """Its traceback repeats what it was about."""

    def broken(*_, **__):
        raise RuntimeError(f"constructed {ESCAPE} {URLS[0]}")

    monkeypatch.setattr("lorameter.records.store.list_runs", broken)
    assert main(["list", "runs"]) == 70
    shown = capsys.readouterr().err
    assert "constructed" in shown
    assert not acts(shown)
    assert SECRET not in shown


def test_the_live_display_shows_it_visibly(small_study):
    """A failure's message, as it happens."""
    from lorameter.records.record import Failure, TrialRecord

    out = io.StringIO()
    failed = TrialRecord(
        trial=f"r0{ESCAPE}", status="crashed", name="plain", variant="x", role="variant", replicate=0, position=0,
        interleaving="replicates", seed=0, started_unix_s=1.0, wall_time_s=1.0,
        failure=Failure(phase="build", kind="X", message=f"[/b] {ESCAPE}"),
    )  # fmt: skip
    with LiveDisplay(console_for(out)) as display:
        display.trial_ended(failed)
    assert "crashed" in out.getvalue()
    assert not acts(out.getvalue())
