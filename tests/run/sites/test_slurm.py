"""Sites that are jobs: what is asked for, what stands in the files between them, and what becomes of a job that is
requeued, ended, or left alone, with real processes of submitit's local executor that only pretend to measure."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import InvalidRunError, UsageError
from harness.records import codec, journal, locks
from harness.report.live import LiveDisplay
from harness.report.terminal import console_for
from harness.run.measure import measure
from harness.run.plan import make_plan
from harness.run.sites import slurm
from harness.run.sites.batch import Batch, ask_slurm, check_here, sbatch_parameters
from harness.run.sites.exchange import (
    ABOUT,
    BEAT,
    DRIVER,
    LEFT,
    MESSAGES,
    ORDERS,
    Pulse,
    Tail,
    beating,
    begin_start,
    starts_of,
)
from harness.run.sites.job import About, SiteJob
from harness.run.sites.joining import Joining
from harness.run.sites.orders import Message
from harness.run.sites.private import make_private
from harness.run.sites.slurm import FOLDER, OWNER, FileLink, Jobs, Owner, clear_dead, open_jobs
from harness.run.sites.together import describe_all
from harness.run.sites.venue import Venue
from harness.studies.place import Asked, read_asked

HERE = Path(__file__).parent


def wait_for(condition):
    deadline = time.monotonic() + 850  # pytest itself ends what takes longer
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_job_without_cards_has_its_node_alone():
    """With cards it takes what it is given; the user has the last word."""
    assert sbatch_parameters({})["exclusive"] is True
    assert "exclusive" not in sbatch_parameters({"gres": "gpu:1"})
    assert "exclusive" not in sbatch_parameters({"exclusive": "no"})
    assert sbatch_parameters({"gpus_per_node": 1, "exclusive": "user"})["exclusive"] == "user"
    made = sbatch_parameters({"cpus_per_task": 8, "reservation": "mine", "time": 5})
    assert made["srun_args"] == ["--cpu-bind=none", "--cpus-per-task=8"]
    assert made["additional_parameters"] == {"requeue": True, "reservation": "mine"}
    assert made["time"] == 5


def test_submitit_takes_all_that_is_passed_on(tmp_path, monkeypatch):
    """And writes it into the script that sbatch reads."""
    submitit = pytest.importorskip("submitit", reason="submitit is not installed: pip install lorameter[slurm]")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    executor = submitit.SlurmExecutor(folder=tmp_path)
    on = "slurm:partition=p,account=a,qos=q,reservation=r,constraint=c,nodelist=n[1-2],exclude=n3,gres=gpu:1,"
    on += "gpus_per_node=1,cpus_per_task=2,mem=4G,time=7,comment=two words,exclusive=user"
    executor.update_parameters(**sbatch_parameters(read_asked(on).parameters))
    text = executor._make_submission_file_text("command", "0")
    for flag in (
        "--partition=p", "--account=a", "--qos=q", "--reservation=r", "--constraint=c", "--nodelist='n[1-2]'",
        "--exclude=n3", "--gres=gpu:1", "--gpus-per-node=1", "--cpus-per-task=2", "--mem=4G", "--time=7",
        "--comment='two words'", "--exclusive=user", "--requeue",
    ):  # fmt: skip
        assert f"#SBATCH {flag}\n" in text


def test_without_sbatch_it_is_refused_before_anything_is_made(capsys, tmp_path, monkeypatch):
    """In one sentence, with what works here."""
    pytest.importorskip("submitit", reason="submitit is not installed: pip install lorameter[slurm]")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["run", "training-step", "--on", "slurm", "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "on = 'slurm': this machine has no sbatch" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


def test_without_submitit_and_with_sites_of_this_machine_it_is_refused(capsys, tmp_path, monkeypatch):
    """With the remedy."""
    runs = ["--runs-dir", str(tmp_path / "runs")]
    assert main(["run", "training-step", "--on", "submitit-local", "--sites", "0,1", *runs]) == 2
    assert "Write sites=N in it" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError, match=r"Install lorameter\[slurm\]"):
        check_here(read_asked("submitit-local"))
    assert not (tmp_path / "runs").exists()


def test_lines_are_read_when_they_are_whole(tmp_path):
    """Each once, and none where there is no file yet."""
    tail = Tail(tmp_path / "lines")
    assert tail.lines() == []
    (tmp_path / "lines").write_bytes("one\ntwo\u2028same\nthr".encode())
    assert tail.lines() == ["one", "two\u2028same"]
    with (tmp_path / "lines").open("a") as file:
        file.write("ee\n")
    assert tail.lines() == ["three"]
    assert tail.lines() == []


def test_silence_is_a_sign_of_life_that_does_not_change_by_the_observers_clock(tmp_path):
    """However wrong the file server's is; a file that is missing gives none."""
    now = [0.0]
    pulse, never = (Pulse(tmp_path / name, 10, clock=lambda: now[0]) for name in ("beat", "missing"))
    (tmp_path / "beat").touch()
    for at, life, silent in ((5, 10**9, False), (14, None, False), (16, None, True), (17, 5 * 10**9, False)):
        now[0] = at
        if life is not None:
            os.utime(tmp_path / "beat", ns=(life, life))
        assert pulse.is_silent() is silent
    assert never.is_silent()


def test_starts_of_a_job_are_numbered(tmp_path):
    """The last is the one that counts, beyond nine as well."""
    made = [begin_start(tmp_path / "site-0") for _ in range(11)]
    assert starts_of(tmp_path / "site-0") == made
    assert made[-1].name == "11"


def start(folder, number=0, node="n1", cards=""):
    """What a job does when it starts."""
    box = begin_start(folder / f"site-{number}")
    (box / BEAT).touch()
    (box / ABOUT).write_text(codec.dumps(About(node=node, pid=1, cards=cards)))
    return box


def say(box, *messages):
    for message in messages:
        journal.append(box / MESSAGES, f"{codec.dumps(message)}\n")


def test_a_link_writes_orders_and_reads_messages_until_the_last(tmp_path):
    """What comes after it is the answer to the next: a farewell, too."""
    box = start(tmp_path)
    link = FileLink(box, 60, lambda: "")
    say(box, Message(says="phase", trial="t", text="turn"), Message(says="done"), Message(says="failed", text="bye"))
    assert ['"phase"' in line for line in link.ask("first")] == [True, False]
    assert ["bye" in line for line in link.ask("second")] == [True]
    link.end()
    link.close()
    assert (box / ORDERS).read_text().split() == ["first", "second", "end", "close"]


def test_a_silent_job_and_one_that_started_again_are_lost(tmp_path):
    """With the last words of its log; what it said before is heard."""
    box = start(tmp_path)
    link = FileLink(box, 0.05, lambda: "CANCELLED")
    with pytest.raises(InvalidRunError, match=r"no sign of life for 0.05 s \(CANCELLED\)"):
        list(link.ask("order"))
    start(tmp_path)
    with pytest.raises(InvalidRunError, match="started again"):
        list(link.ask("order"))
    say(box, Message(says="failed", text="requeued"))
    assert len(list(link.ask("order"))) == 1


class Queue:
    """A batch system that only says what it has in its queue."""

    def __init__(self, *states):
        self._states, self.cancelled = list(states), False

    def states(self):
        return self._states.pop(0) if len(self._states) > 1 else self._states[0]

    def last_words(self, number):
        return "no such partition"

    def cancel(self):
        self.cancelled = True


def test_a_job_that_does_not_start_is_told_of_and_the_others_go_on(tmp_path):
    """It takes part when it starts."""
    asked = Asked(on="slurm:sites=2", kind="slurm", sites=2, start_minutes=0.005, silent_s=60)
    jobs = Jobs(asked, tmp_path, Queue({0: "RUNNING (None)", 1: "PENDING (Resources)"}))
    start(tmp_path)
    (station,), (notice,) = jobs.gather()
    assert station.name == "n1"
    assert notice.code == "site-not-started"
    assert "job 1 of slurm:sites=2 has not started within 0.005 min (PENDING (Resources))" in notice.message
    assert jobs.is_expected()
    start(tmp_path, 1)
    assert [one.name for one in jobs.come()] == ["n1-1"]
    start(tmp_path)
    assert [one.name for one in jobs.come()] == ["n1"]
    assert jobs.come() == []


def test_jobs_that_never_start_are_waited_for_so_long_and_no_longer(tmp_path):
    """Nor at all when they are in the queue no more."""
    asked = Asked(on="slurm", kind="slurm", start_minutes=0.005)
    with pytest.raises(InvalidRunError, match=r"none has started within 0.005 min: PENDING \(Priority\)"):
        Jobs(asked, tmp_path, Queue({0: "PENDING (Priority)"})).gather()
    with pytest.raises(InvalidRunError, match="they have ended"):
        Jobs(dataclasses.replace(asked, start_minutes=60), tmp_path, Queue({})).gather()


def test_a_site_is_named_by_its_node_and_its_cards(tmp_path):
    """As the batch system counts them."""
    asked = Asked(on="slurm:sites=2", kind="slurm", sites=2)
    start(tmp_path, 0, cards="3")
    start(tmp_path, 1, cards="0,1")
    assert [one.name for one in Jobs(asked, tmp_path, Queue({})).come()] == ["n1-card-3", "n1-card-0-1"]


def own(folder, **changes):
    """A folder of a driver."""
    folder.mkdir(parents=True)
    owner = Owner(host=socket.gethostname(), boot=slurm._boot(), silent_s=60)
    (folder / OWNER).write_text(codec.dumps(dataclasses.replace(owner, **changes)))
    (folder / DRIVER).touch()
    return folder


def test_of_dead_drivers_the_jobs_are_cancelled_and_the_folders_removed(tmp_path, monkeypatch):
    """Here by the lock, elsewhere by silence in the file server's time; the living keep theirs."""
    cancelled = []
    monkeypatch.setattr(slurm, "cancel_jobs", lambda *ids: cancelled.extend(ids))
    home = tmp_path / FOLDER
    own(home / "dead", array="7")
    own(home / "far-dead", host="elsewhere", array="8_3")
    os.utime(home / "far-dead" / DRIVER, (1, 1))
    far = own(home / "far", host="elsewhere", array="9")
    (home / "beginning").mkdir()
    live = own(home / "live", array="10")
    with locks.alone(live / OWNER, ""):
        clear_dead(home)
    assert sorted(path.name for path in home.iterdir()) == ["beginning", "far", "live"]
    assert sorted(cancelled) == ["7", "8_3"]
    assert far.is_dir()


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self._marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self._marker),)


@contextlib.contextmanager
def planting(runs, marker):
    """Meanwhile another user who can write into the folder of the jobs replaces their pickles."""
    ended = threading.Event()

    def plant():
        while not ended.wait(0.002):
            for path in runs.glob(f"{FOLDER}/*/jobs/*_submitted.pkl"):
                draft = path.with_suffix(".draft")
                draft.write_bytes(pickle.dumps(Planted(marker)))
                draft.replace(path)

    thread = threading.Thread(target=plant)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    "way", ["the folder is writable", "the folder is a link", "the folder is another user's", "its parent is writable"]
)
def test_no_pickle_is_loaded_from_a_folder_that_others_can_write(way, tmp_path, capsys):
    """The command names the folder and what to do, and submits nothing."""
    pytest.importorskip("submitit", reason="submitit is not installed: pip install lorameter[slurm]")
    runs, marker = tmp_path / "runs", tmp_path / "marker"
    runs.mkdir()
    home = runs / FOLDER
    if way == "the folder is a link":
        (tmp_path / "theirs").mkdir()
        home.symlink_to(tmp_path / "theirs")
    elif way == "the folder is writable":
        home.mkdir()
        home.chmod(0o770)
    elif way == "the folder is another user's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder to another user")
        home.mkdir()
        os.chown(home, 65534, 65534)
    else:
        runs.chmod(0o777)
    command = ["run", "training-step", "--on", "submitit-local:start_minutes=0.05", "--runs-dir", str(runs)]
    with planting(runs, marker):
        code = main(command)
    said = " ".join(capsys.readouterr().err.split())
    assert not marker.exists()
    assert code == 2
    assert str(runs if way == "its parent is writable" else home) in said
    assert "--runs-dir" in said
    assert not list(runs.glob(f"{FOLDER}/*"))


def test_the_folder_of_jobs_may_lie_in_a_shared_one_with_the_sticky_bit(tmp_path):
    """As /tmp is; each user has a folder of their own there, that others cannot rename or write into."""
    runs = tmp_path / "runs"
    runs.mkdir()
    runs.chmod(0o1777)
    make_private(runs / FOLDER)
    assert (runs / FOLDER).stat().st_mode & 0o777 == 0o700


def test_no_option_is_given_to_scancel_for_a_job(tmp_path, monkeypatch, capsys):
    """An id that is read from a file is a number, or it goes nowhere."""
    pytest.importorskip("submitit", reason="submitit is not installed: pip install lorameter[slurm]")
    programs, told = tmp_path / "bin", tmp_path / "told"
    programs.mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {told}\nexit 1\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    runs = tmp_path / "runs"
    array = Owner(host=socket.gethostname(), boot=slurm._boot(), silent_s=60, array="12")
    for name, text in (("a", codec.dumps(array)), ("b", codec.dumps(array).replace('"12"', '"--user=root"'))):
        own(runs / FOLDER / name)
        (runs / FOLDER / name / OWNER).write_text(text)
    assert main(["run", "training-step", "--on", "slurm", "--runs-dir", str(runs)]) == 2
    assert "no job was submitted" in " ".join(capsys.readouterr().err.split())
    cancelled = [line for line in told.read_text().splitlines() if line.startswith("scancel")]
    assert cancelled == ["scancel 12"]


def test_a_folder_goes_though_a_job_that_is_just_ending_adds_to_it(tmp_path, monkeypatch):
    """What it has written since the folder was looked through would keep it for ever."""
    folder, remove = own(tmp_path / FOLDER / "dead"), slurm.shutil.rmtree

    def late(path, **options):
        monkeypatch.undo()
        remove(path, **options)
        path.mkdir()
        (path / LEFT).touch()

    monkeypatch.setattr(slurm.shutil, "rmtree", late)
    clear_dead(tmp_path / FOLDER)
    assert not folder.parent.exists()


def test_a_batch_system_that_does_not_answer_is_not_one_whose_queue_is_empty(tmp_path, monkeypatch):
    """Nobody is taken for gone because of it."""
    for name, code in (
        ("squeue", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"),
        ("down", "exit 1"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert ask_slurm("squeue") == ""
    assert ask_slurm("down") is None
    assert ask_slurm("none-of-that-name") is None


@pytest.fixture
def pretending(monkeypatch, tmp_path):
    """Jobs whose measuring processes only pretend; the folder in which they look for what to do."""
    pytest.importorskip("submitit", reason="submitit is not installed: pip install lorameter[slurm]")
    monkeypatch.syspath_prepend(str(HERE))
    ways = [str(HERE), str(HERE.parents[2]), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, ways)))
    monkeypatch.setenv("PRETENDING", str(tmp_path))
    monkeypatch.setenv("LORAMETER_LOCKS", str(tmp_path / "locks"))
    import pretending

    monkeypatch.setattr(slurm, "SiteJob", pretending.PretendingJob)
    return tmp_path


def job_of(runs, number):
    """The process of the last start of a job, and its folder."""
    (home,) = (runs / FOLDER).iterdir()
    box = starts_of(home / f"site-{number}")[-1]
    return codec.from_json(About, codec.parse((box / ABOUT).read_text()), "about").pid, box


def lines(runs):
    return [line for path in runs.glob("*/trials.jsonl") for line in path.read_text().splitlines()]


def test_a_job_that_is_requeued_loses_its_replicate_and_comes_again(pretending, small_study, monkeypatch):
    """The other measures it, what has ended stays, and nothing of the jobs is left."""
    protocol = dataclasses.replace(small_study.protocol, replicates=4)
    plan = make_plan(dataclasses.replace(small_study, protocol=protocol), phases=("train",))
    runs = pretending / "runs"
    runs.mkdir()
    host = socket.gethostname()
    stuck = pretending / "stuck"
    stuck.write_text(host)
    deeds, told = [], []
    note = Joining._note
    monkeypatch.setattr(Joining, "_note", lambda self, code, *said: (note(self, code, *said), told.append(code)))

    def requeue(jobs):
        with contextlib.ExitStack() as stack:
            stack.callback(stuck.unlink)  # else nobody would end
            act(jobs)

    def act(jobs):
        number = jobs._taken[host]  # the one that started first has the name alone
        wait_for(lambda: len(lines(runs)) >= 3 * len(plan.slots) // 4)  # all that the other one gets
        pid, box = job_of(runs, number)
        stuck.write_text(f"-{1 - number}")
        os.kill(pid, signal.SIGUSR2)
        wait_for(lambda: starts_of(box.parent)[-1] != box)
        deeds.append((box / LEFT).exists())
        wait_for(lambda: told)

    asked = read_asked("submitit-local:sites=2,silent_s=120")
    with open_jobs(asked, runs) as (stations, notices, jobs), LiveDisplay(console_for(stderr=True)) as display:
        assert not notices
        (together,) = describe_all(stations)
        thread = threading.Thread(target=requeue, args=(jobs,))
        thread.start()
        run = measure(plan, runs=runs, display=display, venue=Venue(stations=tuple(stations), arrivals=jobs))
    thread.join()
    assert together.code == "sites-together"
    assert deeds == [True]
    assert {record.status for record in run.records} == {"ok"}
    assert [record.trial for record in run.records] == [slot.trial for slot in plan.slots]
    sites = {}
    for record in run.records:
        sites.setdefault(record.replicate, set()).add(record.site)
    assert all(len(of_one) == 1 for of_one in sites.values())
    said = {notice.code: notice.message for notice in run.manifest.notices}
    assert f"site {host} was lost" in said["site-lost"]
    assert f"site {host} came while others measured" in said["site-joined"]
    assert not (runs / FOLDER).exists()


def test_the_last_job_that_is_ended_ends_the_run_and_one_without_a_driver_ends_itself(pretending, small_study):
    """What it had said is kept, nothing that the signal broke is a result, and nobody waits for a job that is gone."""
    runs = pretending / "runs"
    runs.mkdir()
    (pretending / "stuck").write_text(socket.gethostname())
    plan = make_plan(small_study, phases=("train",))

    def end():
        with contextlib.suppress(AssertionError):
            wait_for(lambda: any('"turn"' in path.read_text() for path in runs.glob(f"{FOLDER}/*/site-0/1/{MESSAGES}")))
        os.kill(job_of(runs, 0)[0], signal.SIGTERM)

    asked = read_asked("submitit-local:silent_s=120")
    threading.Thread(target=end).start()
    with open_jobs(asked, runs) as (stations, _, jobs), LiveDisplay(console_for(stderr=True)) as display:
        describe_all(stations)
        with pytest.raises(InvalidRunError, match="its job was cancelled or preempted"):
            measure(plan, runs=runs, display=display, venue=Venue(stations=tuple(stations), arrivals=jobs))
    assert not (runs / FOLDER).exists()
    folder = pretending / "alone"
    folder.mkdir()
    batch = Batch(asked, folder)
    with beating(folder / DRIVER, 2):
        batch.submit([slurm.SiteJob(folder=str(folder), number=0, silent_s=2)])
        box = wait_for(lambda: starts_of(folder / "site-0"))[0]
    wait_for(lambda: (box / LEFT).exists())
    assert "whoever started it is gone" in (box / MESSAGES).read_text()
    wait_for(lambda: not batch.states())


def test_a_job_whose_driver_left_before_it_started_does_nothing(tmp_path):
    """Nor makes anything."""
    assert "gone" in SiteJob(folder=str(tmp_path), number=0, silent_s=5)()
    assert not list(tmp_path.iterdir())
