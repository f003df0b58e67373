"""Small runs with injected values, for tests of programs that read runs; they are written to a temporary folder on
import.

Manifests and the fields of a record without an injected value come from the two runs that are committed under reports/,
so that constructed runs have the form of measured ones. Their samples are drawn by seeded generators of the standard
library and written with six digits. Nothing of `harness` is imported, so that these files do not change with it.

RUNS        what a user may have in a runs directory, complete and interrupted
DAMAGED     runs that cannot be read, each for another reason
PROFILES    all facts of a profile, as `lorameter profile` writes them
"""

from __future__ import annotations

import atexit
import copy
import hashlib
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPORTS = Path(__file__).parents[1] / "reports"
MEASURED = {
    "lora-or-qlora": REPORTS / "2026-11-30_amd-epyc-2cpu_lora-or-qlora",
    "parameters": REPORTS / "2026-11-24_amd-epyc-2cpu_llama2-lora-parameters",
}
REFERENCE, NF4, ALPHA = "lora-r16", "qlora-nf4-r16", "qlora-nf4-r64-a256"
SWEEP = ("r64-a16-d0.1", "lora_alpha=32", "lora_alpha=64", "lora_alpha=256", "r=16", "r=32", "r=512")
JUDGED = ("1", "2", "3", "3 to EOS", "4", "8", "9", "11")
"""Claims on alpha and r only, whose levels this sweep has."""
START_UNIX_S = 1795000000.0
MIB = 2**20
SCHEMA = 5
KEPT_VALUES = "host_watched_train_s new_tokens packed_4bit_decode threads trainable_parameters warmup_steady".split()

Json = dict[str, Any]
Change = Callable[[Json], Json | None]


def round_digits(value: float) -> float:
    return float(f"{value:.6g}")


def read_report_run(source: str) -> tuple[Json, list[Json]]:
    """Return manifest and records of a committed run."""
    manifest = json.loads((MEASURED[source] / "manifest.json").read_text(encoding="utf-8"))
    found = [json.loads(line) for line in (MEASURED[source] / "checks.jsonl").read_text(encoding="utf-8").splitlines()]
    evidence = {one["hash"]: one["check"] for one in found}
    lines = (MEASURED[source] / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return manifest, [one | {"checks": [evidence[name] for name in one["checks"]]} for one in records]


class ConstructedRun:
    """One run: the machine's effect on all arms of a turn, the noise of each arm, and the injected values."""

    def __init__(
        self,
        name: str,
        *,
        source: str = "lora-or-qlora",
        variants: Sequence[str] = (REFERENCE, NF4, ALPHA),
        replicates: int = 3,
        turns: int = 6,
        phases: Sequence[str] = ("train",),
        ratios: dict[str, float] | None = None,
        control: float = 1.0,
        noise: float = 0.01,
        scale: float = 1.0,
        losses: dict[str, float] | None = None,
        requests: dict[str, float] | None = None,
        answers: dict[str, float] | None = None,
        sides: bool = False,
        checks: int = 3,
        peaks: int = 2,
        heavier_mib: int = 0,
        status: str = "complete",
        change: Change = lambda record: record,
        edit: Change = lambda manifest: manifest,
    ) -> None:
        self.name = name
        self.rng = random.Random(name)
        self.manifest, self._templates = read_report_run(source)
        self.variants, self.replicates, self.turns, self.phases = variants, replicates, turns, phases
        self.ratios, self.control, self.noise, self.scale = ratios or {}, control, noise, scale
        self.losses, self.requests, self.answers = losses or {}, requests or {}, answers or {}
        self.level, self.sides, self.checks, self.peaks = self.manifest["interleaving"], sides, checks, peaks
        self.status, self.change, self.edit = status, change, edit
        self.heavier_mib = heavier_mib
        self.reference = self.manifest["study"]["reference"]

    def write(self, folder: Path) -> Path:
        """Write the run and return its directory; a record that `change` drops stays in the plan."""
        planned = list(self._records())
        kept = [changed for record in copy.deepcopy(planned) if (changed := self.change(record)) is not None]
        order = list(dict.fromkeys(record["trial"] for record in planned))
        manifest = self.edit(self._manifest(order)) or {}
        path = folder / self.name
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(_format_json(manifest, indent=1), encoding="utf-8")
        evidence = {_hash_check(check): check for record in kept for check in record["checks"]}
        lines = [record | {"checks": list(map(_hash_check, record["checks"]))} for record in kept]
        named = [_format_json({"hash": name, "check": check}) for name, check in evidence.items()]
        (path / "checks.jsonl").write_text("".join(named), encoding="utf-8")
        (path / "trials.jsonl").write_text("".join(map(_format_json, lines)), encoding="utf-8")
        return path

    def _manifest(self, order: list[str]) -> Json:
        made = copy.deepcopy(self.manifest)
        study = made["study"]
        if self.sides and self.reference not in self.variants:
            study["reference"] = self.variants[0]
        named = {*self.variants, study["reference"]}
        study["variants"] = [variant for variant in study["variants"] if variant["name"] in named]
        study["protocol"] |= {"replicates": self.replicates, "turns": self.turns, "steps_per_turn": 1}
        study["protocol"] |= {"phases": list(self.phases), "peak_replicates": self.peaks}
        made |= {
            "run": self.name, "order": order, "created_unix_s": START_UNIX_S, "phases": list(self.phases), "seed": 7,
            "interleaving": self.level, "selection": list(self.variants), "status": self.status, "schema": SCHEMA,
        }  # fmt: skip
        made["provenance"].pop("settings", None)
        made["tokens"]["examples"] = []
        if self.sides:
            made["sides"] = {
                side: {"label": label, "worker": f"0.1.0 sha256:{worker}", "facts": _facts(peft)}
                for side, label, worker, peft in (
                    ("base", "main (1111111111)", "aaaaaaaaaaaa", "0.20.0"),
                    ("candidate", "topic (2222222222)", "bbbbbbbbbbbb", "0.21.2"),
                )
            }
        study["claims"] = [claim for claim in study["claims"] if claim["id"] in JUDGED]
        return made

    def _arms(self) -> list[tuple[str, str, str]]:
        """Return name, role and side of each trial of a replicate."""
        if not self.sides:
            arms = [(name, "variant", "") for name in self.variants]
            return [*arms, (self.reference, "control", "")] if self.reference in self.variants else arms
        arms = [(name, "variant", side) for name in self.variants for side in ("base", "candidate")]
        return [*arms, (self.variants[0], "control", "base")]

    def _records(self) -> Iterator[Json]:
        position = 0
        for replicate in range(self.replicates):
            arms = self._arms()
            self.rng.shuffle(arms)
            machine = self._machine()
            for isolated in (False, True):
                for name, role, side in arms:
                    alone = role == "control" and "cold" not in self.phases
                    if isolated and (replicate >= self.peaks or alone):
                        continue
                    yield self._record(name, role, side, replicate, position, machine, isolated=isolated)
                    position += 1

    def _machine(self) -> list[float]:
        """Return step times of the reference in one replicate; the machine's noise is far larger than an arm's own."""
        level = 0.05 * self.scale * math.exp(self.rng.gauss(0, 0.04))
        return [level * math.exp(self.rng.gauss(0, 0.08)) for _ in range(self.turns)]

    def _record(
        self, name: str, role: str, side: str, replicate: int, position: int, machine: list[float], *, isolated: bool
    ) -> Json:
        template = next(
            one for one in self._templates if one["name"] == name and one["trial"].endswith("-isolated") == isolated
        )
        suffix = (
            (f"-{side}" if side else "") + ("-control" if role == "control" else "") + ("-isolated" if isolated else "")
        )
        made = {key: copy.deepcopy(template[key]) for key in ("name", "variant", "failure", "seed")}
        made |= {
            "schema": SCHEMA, "trial": f"r{replicate}-{name}{suffix}", "role": role, "side": side, "attempt": 0,
            "replicate": replicate, "position": position, "started_unix_s": START_UNIX_S + 20.0 * position,
            "status": "ok", "wall_time_s": 15.0, "interleaving": "replicates" if isolated else self.level,
            "notices": [], "log": f"logs/r{replicate}-{name}{suffix}.log",
            "turn_lengths": [] if isolated else [1] * self.turns,
            "checks": self._make_checks(template), "memory": self._memory(name, side) if isolated else {},
            "tokens": {"hash": template["tokens"]["hash"][:12], "padded_tokens": 0, "real_tokens": 32768},
            "values": {key: round_digits(template["values"][key]) for key in KEPT_VALUES if key in template["values"]},
        }  # fmt: skip
        if not isolated:
            made["values"]["held_out_loss"] = round_digits(self._loss(name) * 1.02)
            factor = self.ratios.get(name, 1.0) if side != "base" else 1.0
            factor *= self.control if role == "control" else 1.0
            made["samples"] = self._samples(name, factor, machine)
        else:
            made["samples"] = {}
        if "cold" in self.phases and isolated:
            made["values"]["cold_start_time_s"] = self._near(4.0)
            made["samples"]["cold_start_time_s"] = [made["values"]["cold_start_time_s"]]
        return made

    def _samples(self, name: str, factor: float, machine: list[float]) -> dict[str, list[float]]:
        steps = [self._near(turn * factor) for turn in machine]
        made = {
            "step_time_s": steps,
            "step_cpu_time_s": [round_digits(0.99 * step) for step in steps],
            "timed_loss": [round_digits(self._loss(name) + 0.5 / (turn + 1)) for turn in range(self.turns)],
            "turn_padded_tokens": [0.0] * self.turns,
            "turn_tokens": [256.0] * self.turns,
            "turn_sequences": [2.0] * self.turns,
            "warmup_loss": [round_digits(self._loss(name) + 1.0)] * 3,
            "warmup_step_time_s": [
                round_digits(2 * steps[0]),
                round_digits(1.1 * steps[0]),
                round_digits(1.05 * steps[0]),
            ],
            "remaining_loss": [],
        }
        if "generate" in self.phases:
            slower = self.requests.get(name, 1.0)
            made["request_time_s"] = [self._near(1.2 * turn * slower) for turn in machine[:5]]
            made["first_token_time_s"] = [self._near(0.1 * turn * slower) for turn in machine[:5]]
            made["time_per_output_token_s"] = [self._near(0.07 * turn * slower) for turn in machine[:5]]
            if self.answers:
                tokens = self.answers.get(name, 48.0)
                made["open_ended_tokens"] = [tokens] * 3
                made["open_ended_request_time_s"] = [self._near(0.07 * turn * tokens) for turn in machine[:3]]
        return made

    def _near(self, value: float) -> float:
        return round_digits(value * math.exp(self.rng.gauss(0, self.noise)))

    def _loss(self, name: str) -> float:
        return self.losses.get(name, 4.6) * math.exp(self.rng.gauss(0, 0.001))

    def _make_checks(self, template: Json) -> list[Json]:
        """Return some checks with a short reason."""
        return [check | {"reason": "seen"} for check in template["checks"][: self.checks]]

    def _memory(self, name: str, side: str) -> Json:
        peak = 440 + 12 * self.variants.index(name) + self.rng.randrange(2)
        peak += self.heavier_mib if side == "candidate" else 0
        return {
            "host_rss_at_start_bytes": 339 * MIB, "host_peak_train_bytes": peak * MIB,
            "host_peak_generate_bytes": (peak - 20) * MIB, "adapter_bytes": 1196032, "optimizer_state_bytes": 2392288,
        }  # fmt: skip


def _facts(peft: str) -> Json:
    return {
        "python": "3.11.7", "cuda": None, "git": {"commit": None, "dirty": None},
        "packages": {"peft": peft, "torch": "2.13.0+cpu"},
    }  # fmt: skip


def _hash_check(check: Json) -> str:
    return hashlib.sha256(_format_json(check).strip().encode()).hexdigest()[:16]


def _format_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, sort_keys=True, indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def fail_record(record: Json, status: str, phase: str, kind: str, message: str) -> Json:
    """Return the record of a failed trial: no samples, and the reason."""
    fault = {"phase": phase, "kind": kind, "message": message, "traceback": f"Traceback: {kind}: {message}"}
    return record | {
        "status": status,
        "failure": fault,
        "samples": {},
        "values": {},
        "turn_lengths": [],
        "checks": [],
    }


# --- runs -------------------------------------------------------------------------------------------------------------


def fail_trials(record: Json) -> Json | None:
    ends = {
        f"r1-{NF4}": ("crashed", "timed", "SIGSEGV", "the process ended with signal 11"),
        f"r2-{NF4}": ("timeout", "timed", "Timeout", "no answer within 600 s"),
        f"r0-{ALPHA}-isolated": ("oom", "build", "OutOfMemoryError", "tried to allocate 2.00 GiB"),
        f"r3-{REFERENCE}": ("not_run", "start", "TimeLimit", "the limit of time was reached"),
    }
    return fail_record(record, *ends[record["trial"]]) if record["trial"] in ends else record


def make_loss_nan(record: Json) -> Json:
    """Make a trial invalid by a loss that is NaN, which JSON holds as a string."""
    if record["trial"] != f"r1-{ALPHA}":
        return record
    samples = record["samples"]
    samples["timed_loss"] = [*samples["timed_loss"][:3], "NaN", "NaN", "Infinity"]
    record["values"]["held_out_loss"] = "NaN"
    fault = {"phase": "timed", "kind": "LossNotFinite", "message": "the loss of step 4 is nan", "traceback": ""}
    return record | {"status": "invalid", "failure": fault, "samples": samples}


def make_path_inactive(record: Json) -> Json:
    """Make a required path of one variant inactive in every trial, which makes each of them invalid."""
    if record["name"] != NF4 or not record["checks"]:
        return record
    checks = [record["checks"][0] | {"observed": "math", "status": "fallback", "reason": "forward: 4 math"}]
    message = f"{checks[0]['path']}: required {checks[0]['required']!r}, forward: 4 math"
    failed = fail_record(record, "invalid", "verify", "RequiredPathNotActive", message)
    return failed | {"checks": checks + record["checks"][1:]}


def interrupt_third_replicate(record: Json) -> Json | None:
    """Return the records of a run that was stopped in its third replicate."""
    if record["replicate"] > 2:
        return None
    if record["replicate"] == 2 and record["name"] != REFERENCE:
        return fail_record(record, "interrupted", "timed", "UnderWay", "the trial had not ended")
    return record


def keep_two_replicates(record: Json) -> Json | None:
    return record if record["replicate"] < 2 else None


def disturb(path: Path) -> None:
    """Add trials that were measured again: one succeeded at the second attempt, one never did."""
    lines = [json.loads(line) for line in (path / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    fault = {"phase": "train", "kind": "Disturbed", "traceback": ""}
    fault["message"] = "while training the machine swapped 64 MiB in 1.00 s (constructed)"
    again = []
    for record in lines:
        group = record["replicate"], record["interleaving"]
        if group == (1, "lockstep"):
            first = record | ({"status": "invalid", "failure": fault} if record["name"] == NF4 else {})
            again += [first, record | {"attempt": 1, "started_unix_s": record["started_unix_s"] + 500.0}]
        elif group == (2, "lockstep") and record["name"] == ALPHA:
            disturbed = record | {"status": "invalid", "failure": fault}
            disturbed["values"] = record["values"] | {
                "host_swap_in_train_bytes": 64.0 * MIB,
                "host_watched_train_s": 1.0,
            }
            again += [disturbed | {"attempt": attempt} for attempt in range(3)]
        else:
            again.append(record)
    (path / "trials.jsonl").write_text("".join(map(_format_json, again)), encoding="utf-8")


def cut_last_line(path: Path) -> None:
    """Truncate the last line, as a process that was killed while writing does."""
    text = (path / "trials.jsonl").read_text(encoding="utf-8")
    (path / "trials.jsonl").write_text(text[: -len(text.splitlines()[-1]) // 2], encoding="utf-8")


def add_resumptions(manifest: Json) -> Json:
    harness = manifest["provenance"]["worker"]["harness"]
    times = ((START_UNIX_S + 86400.0, harness, 30.0), (START_UNIX_S + 172800.0, "0.1.0 sha256:cccccccccccc", None))
    manifest["resumed"] = [
        {"unix_s": at, "harness": by, "commit": "3" * 40, "max_minutes": limit} for at, by, limit in times
    ]
    return manifest | {"stopped": "the limit of 30 min was reached"}


def change_machine(manifest: Json) -> Json:
    """Change torch and the CPU."""
    manifest["provenance"]["libraries"]["torch"] = "2.12.1+cpu"
    manifest["provenance"] |= {"cpu_model": "Another CPU", "device_name": "Another CPU"}
    return manifest | {"fingerprint": "0123456789ab"}


def crash_candidate(record: Json) -> Json:
    if record["trial"] == f"r2-{NF4}-candidate":
        return fail_record(record, "crashed", "timed", "SIGKILL", "the process ended with signal 9")
    return record


def deselect_variant(manifest: Json) -> Json:
    """Deselect a variant of the sweep, so that its claim cannot be judged."""
    manifest["selection"] = [name for name in manifest["selection"] if name != "r=32"]
    return manifest


def drop_deselected_variant(record: Json) -> Json | None:
    return None if record["name"] == "r=32" else record


BOTH = ("train", "generate")
USUAL = {NF4: 1.1, ALPHA: 1.002}
"""Against the reference, one variant is much slower, and the other is equivalent."""
LOSSES = dict(zip(SWEEP, (3.9, 3.8, 3.6, 3.2, 3.9, 3.9, 3.91), strict=True))
ANSWERS = dict(zip(SWEEP, (48.0, 46.0, 40.0, 12.0, 48.0, 48.0, 48.0), strict=True))
SWEEP_RUN: Json = {
    "source": "parameters", "variants": SWEEP, "replicates": 4, "phases": BOTH, "losses": LOSSES, "answers": ANSWERS,
    "ratios": {"r=512": 1.3}, "requests": {"r=512": 1.3}, "peaks": 1, "checks": 1,
}  # fmt: skip


def runs() -> list[tuple[ConstructedRun, Callable[[Path], None]]]:
    """Return every run with the changes of its files afterwards."""

    def nothing(path: Path) -> None:
        pass

    plain = [
        ConstructedRun("sound", replicates=5, phases=BOTH, ratios=USUAL),
        ConstructedRun("slower", replicates=5, phases=BOTH, ratios={NF4: 1.5, ALPHA: 1.0}),
        ConstructedRun("another-day", replicates=5, phases=BOTH, scale=1.3, ratios=USUAL),
        ConstructedRun("cold", phases=(*BOTH, "cold"), peaks=4),
        ConstructedRun("noisy", replicates=3, noise=0.2),
        ConstructedRun("fewer-variants", variants=(REFERENCE, NF4)),
        ConstructedRun("without-reference", variants=(NF4, ALPHA)),
        ConstructedRun("one-replicate", replicates=1, peaks=1),
        ConstructedRun("control-failed", control=1.2),
        ConstructedRun("failed", replicates=4, change=fail_trials),
        ConstructedRun("diverged", change=make_loss_nan),
        ConstructedRun("fallback", change=make_path_inactive),
        ConstructedRun("interrupted", replicates=4, status="interrupted", change=interrupt_third_replicate),
        ConstructedRun("given-up", replicates=4, status="failed", change=keep_two_replicates),
        ConstructedRun("other-machine", replicates=5, phases=BOTH, edit=change_machine),
        ConstructedRun("resumed", ratios=USUAL, edit=add_resumptions),
        ConstructedRun(
            "ab", sides=True, variants=(REFERENCE, NF4), replicates=6, turns=8, ratios={NF4: 1.06}, heavier_mib=8
        ),
        ConstructedRun(
            "ab-improved", sides=True, variants=(NF4,), replicates=6, turns=8, phases=BOTH, ratios={NF4: 0.9}
        ),
        ConstructedRun("ab-unsure", sides=True, variants=(NF4,), replicates=3, noise=0.2),
        ConstructedRun("ab-failed", sides=True, variants=(REFERENCE, NF4), change=crash_candidate),
        ConstructedRun("swept", **SWEEP_RUN),
        ConstructedRun(
            "swept-in-part",
            **SWEEP_RUN
            | {
                "variants": (*SWEEP[:4], "r=512", "r=32"),
                "replicates": 2,
                "edit": deselect_variant,
                "change": drop_deselected_variant,
            },
        ),
    ]
    return [
        *((run, nothing) for run in plain),
        (ConstructedRun("disturbed"), disturb),
        (ConstructedRun("killed", replicates=4, status="running", change=keep_two_replicates), cut_last_line),
    ]


# --- runs that cannot be read -----------------------------------------------------------------------------------------


def damage(folder: Path) -> None:
    """Write a small run with one kind of damage after another."""

    def write_damaged(name: str, manifest: Change | None = None, record: Change | None = None) -> Path:
        run = ConstructedRun(name, replicates=1, checks=1, variants=(REFERENCE,))
        if manifest is not None:
            run.edit = manifest
        if record is not None:
            run.change = lambda one: record(one) if one["role"] == "variant" else one
        return run.write(folder)

    write_damaged("newer-schema", manifest=lambda one: one | {"schema": 99})
    write_damaged("wrong-type", record=lambda one: one | {"replicate": "one"})
    write_damaged("no-records").joinpath("trials.jsonl").unlink()
    write_damaged("cut-manifest").joinpath("manifest.json").write_text(
        f'{{"schema": {SCHEMA}, "run": ', encoding="utf-8"
    )


# --- profiles ---------------------------------------------------------------------------------------------------------

PHASES = {"data": 0.001, "forward": 0.030, "backward": 0.060, "update": 0.008}
PRODUCTS = {
    "products_forward": 3.2e6, "products_head": 8.2e4, "products_inputs": 3.1e6, "products_weights": 3.0e5,
    "products_plain": 2.9e6, "products_repeated": 2.5e6, "products_passes": 0.0, "products_attention": 1024.0,
}  # fmt: skip
OPERATORS = {
    "data": (),
    "forward": (("aten::mm", "matmul", 0.03), ("aten::bernoulli_", "elementwise", 0.02)),
    "backward": (("aten::mm", "matmul", 0.11), ("bitsandbytes::dequantize_4bit", "dequantize", 0.008)),
    "update": (("aten::_fused_adamw_", "optimizer", 0.008),),
}
"""Constructed times under the profiler, which doubles them."""


def profile(*, missing: str = "") -> Json:
    """Return a profile of the 4-bit variant."""
    rng = random.Random(f"profile {missing}")
    manifest, records = read_report_run("lora-or-qlora")
    variant = next(one for one in manifest["study"]["variants"] if one["name"] == NF4)
    template = next(one for one in records if one["trial"] == f"r0-{NF4}-isolated")
    noise = [math.exp(rng.gauss(0, 0.004)) for _ in range(8)]

    def times(seconds: float) -> list[float]:
        return [round_digits(seconds * factor * math.exp(rng.gauss(0, 0.001))) for factor in noise]

    whole = sum(PHASES.values()) + 0.001
    samples = {f"phase_{name}_s": times(seconds) for name, seconds in PHASES.items()} | {
        "plain_step_time_s": times(whole), "plain_step_cpu_time_s": times(0.99 * whole),
        "bordered_step_time_s": times(whole), "bordered_step_cpu_time_s": times(0.99 * whole),
        "between_steps_s": times(2e-5)[:7],
    }  # fmt: skip
    record = {
        "schema": SCHEMA, "trial": f"r0-{NF4}", "status": "ok", "name": NF4, "variant": template["variant"], "seed": 0,
        "role": "variant", "replicate": 0, "position": 0, "interleaving": "replicates", "started_unix_s": START_UNIX_S,
        "wall_time_s": 20.0, "samples": samples, "memory": template["memory"], "checks": template["checks"][:4],
        "values": {"useful_positions": 192.0, "useful_pairs": 9312.0, "trainable_parameters": 299008.0, **PRODUCTS},
        "notices": [{"code": "constructed", "message": "a notice of the trial.", "remedy": "None."}],
    }  # fmt: skip
    phases = [
        {
            "phase": name, "window_s": 2 * seconds, "busy_s": round_digits(sum(one[2] for one in OPERATORS[name])),
            "operators": [{"name": op, "category": kind, "calls": 2.0, "time_s": s} for op, kind, s in OPERATORS[name]],
            "totals_s": {"aten::dropout": 0.025} if name == "forward" else {},
        }
        for name, seconds in PHASES.items()
    ]  # fmt: skip
    peak = {"device": "this CPU with 1 thread", "source": "constructed"}
    peaks = {"product": {"rate": "bfloat16", "per_s": 1e12} | peak, "memory": {"rate": "memory", "per_s": 1e10} | peak}
    kinds = {"process": 337 * MIB, "linear_weights": 2 * MIB, "gradients": MIB, "optimizer_state": 2 * MIB}
    return {
        "schema": 1, "study": "lora-or-qlora", "variant": variant, "workload": manifest["study"]["workload"],
        "device": "cpu", "device_name": "AMD EPYC", "threads": 1, "cpus": 2, "wide_registers": True, "record": record,
        "memory_bytes": 8 * 2**30, "peaks": peaks, "measured_peaks": {"memory": peaks["memory"]},
        "activity": {
            "device": "cpu", "step_times_s": [0.2, 0.201, 0.199], "phases": [] if missing else phases,
            "missing": missing,
        },
        "memory": {"phase": "train", "kinds": kinds, "peak_bytes": 439 * MIB},
        "estimates": kinds | {"gradients": 2 * MIB},
    }  # fmt: skip


FACTS = {
    "explained": profile(),
    "unseen": profile(missing="the profiler recorded nothing (constructed)"),
}


FOLDER = Path(tempfile.mkdtemp(prefix="lorameter-constructed-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
RUNS, DAMAGED, PROFILES = (FOLDER / name for name in ("runs", "damaged", "profiles"))


def construct() -> None:
    """Write all runs, damaged runs and profiles."""
    for run, afterwards in runs():
        afterwards(run.write(RUNS))
    damage(DAMAGED)
    PROFILES.mkdir()
    for name, document in FACTS.items():
        (PROFILES / f"{name}.json").write_text(_format_json(document, indent=1), encoding="utf-8")


construct()
