"""Does a check ever fail on a run that is what it claims to be? Real trials of the harness, every claim judged.

    python benchmarks/selftest/false_alarms.py [--model tiny-llama smollm2-135m] [--twins NAME]

A check that cries wolf is switched off, and then it finds nothing. So each variant below is built as the harness
builds it, and its own claims are judged by both instruments while it trains, then while it answers a request: bfloat16
and float32, NF4 and unquantised, packed and padded, and every variant of the built-in studies as they are fitted to
this machine. Sequences are short, and nothing is timed. No study brings a model of its own: the models are those named.

Then come the healthy twins, which are not the harness's: methods of PEFT, everyday steps, other people's loops,
families of transformers in NF4, and runs of two ranks (`healthy`, and beside it). One is sick, and must be found.

A claim that is not active is a false alarm, and so is one that is not judged, unless it is one that the spy leaves to
the profile. Exit status 1 with the reasons where there is any.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import contextlib
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import healthy_families  # noqa: F401
import healthy_loops  # noqa: F401
import healthy_methods  # noqa: F401
import healthy_steps  # noqa: F401  its twins enter themselves, as do those of the next
import torch
from healthy import MAKERS, SkippedError
from healthy_ranks import RANKED, verified
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import kernels_check
from harness.machine.provenance import probe_machine
from harness.models import catalogue
from harness.records import codec
from harness.records.record import Fragment
from harness.studies.protocol import Protocol
from harness.studies.request import TrialRequest
from harness.studies.study_file import builtin_studies, load_study
from harness.studies.variant import Variant
from harness.studies.workload import Workload
from harness.trial.building.requirements import requirements_of
from harness.trial.building.shared import SharedBase
from harness.trial.data.tokens import prepare
from harness.trial.trial import Trial

MODELS = ("tiny-llama", "smollm2-135m")
INSTRUMENTS = ("profile", "spy")
SHORT: dict[str, Any] = {
    "sequence_length": 64, "batch_size": 1, "train_sequences": 16, "held_out_records": 2, "held_out_sequences": 1,
    "prompt_tokens": 8, "new_tokens": 4, "natural_tokens": 0,
}  # fmt: skip
BYTES_IN_A_SEQUENCE = 256
"""Sequence length where a token is a byte: shorter ones have no room left to pad behind a record."""
PADDED = {"attention.mask": "explicit"}
"""Required of a padded case beside its claims: a batch in which nothing was padded would have no mask to show."""
WHILE_GENERATING = ("attention.backend", "attention.dtype", "base.bits", "base.quant_type", "lora.attached")
"""Claims of a variant that hold for its requests too."""
NEEDS_A_PROFILE = frozenset({"packing.isolated", "tf32"})
"""What the spy leaves to the profile in an eager step."""
SHOWN_BY_OPERATORS = frozenset({
    *("attention.backend", "attention.dtype", "attention.mask", "base.gemm_path", "checkpointing"),
    *("checkpointing.layers", "optimizer.fused"),
})  # fmt: skip
"""And what besides where the step enters compiled code, whose operators a dispatch mode does not see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One variant on one workload."""

    name: str
    variant: Variant
    workload: Workload
    requirements: Mapping[str, Any]
    """Beside those that follow from the variant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one instrument said of one case in one phase."""

    case: str
    model: str
    phase: str
    instrument: str
    required: Mapping[str, Any]
    checks: tuple[Mapping[str, Any], ...]

    def _is_left_to_a_profile(self, path: str) -> bool:
        return path in NEEDS_A_PROFILE or bool(self.required.get("compile") and path in SHOWN_BY_OPERATORS)

    @property
    def active(self) -> list[str]:
        """Required paths that are active, against the value that the variant claims."""
        return [
            path
            for path, value in self.required.items()
            if (check := self._judged.get(path)) and check["status"] == "active" and check["required"] == value
        ]

    @property
    def left_out(self) -> list[str]:
        """Required paths without a check."""
        return [path for path in self.required if path not in self._judged]

    @property
    def alarms(self) -> list[str]:
        """Claims that are not active, and those that were to be judged and were not, with the reasons."""
        where = f"{self.model}, {self.case}, {self.phase}, {self.instrument}"
        said = []
        for path, value in self.required.items():
            check = self._judged.get(path)
            if check is None and not (self.instrument == "spy" and self._is_left_to_a_profile(path)):
                said.append(f"{where}: {path}: {value!r} is claimed and was not judged")
            elif check is not None and path not in self.active:
                verdict = f"judged against {check['required']!r}, {check['status']}: {check['reason']}"
                said.append(f"{where}: {path}: {value!r} is claimed, {verdict}")
        return said

    @property
    def _judged(self) -> dict[str, Mapping[str, Any]]:
        return {check["path"]: check for check in self.checks}


def cases(model: str) -> Iterator[Case]:
    """The grid and the variants of the built-in studies, on one model; what two studies share is one case.

    A study keeps its own workload on its own model; on any other it is cut short.
    """
    short = Workload(model=model, **SHORT)
    if catalogue.resolve(model).tokenizer == "byte":
        short = dataclasses.replace(short, sequence_length=BYTES_IN_A_SEQUENCE)
    for dtype, quantization, layout in itertools.product(
        ("bfloat16", "float32"), ("none", "nf4"), ("packed", "padded")
    ):
        name = f"{dtype} {'unquantised' if quantization == 'none' else quantization} {layout}"
        variant = Variant(
            name=name.replace(" ", "-"), r=8, lora_dropout=0.1, dtype=dtype, quantization=quantization,
            compute_dtype=dtype,
        )  # fmt: skip
        yield Case(
            name=name, variant=variant, workload=dataclasses.replace(short, layout=layout),
            requirements=PADDED if layout == "padded" else {},
        )  # fmt: skip
    seen = set()
    machine = probe_machine()
    for name in builtin_studies():
        study = load_study(name, device=machine.kind)
        if study.engine is not None and study.engine.obstacle(machine.device):
            continue
        own = study.workload
        workload = own if model == own.model else dataclasses.replace(own, model=model, **SHORT)
        for variant in study.variants:
            same = (variant, workload, codec.dumps(study.requirements))
            if same not in seen:
                seen.add(same)
                yield Case(
                    name=f"{name}: {variant.name}", variant=variant, workload=workload, requirements=study.requirements
                )


def judge(case: Case, folder: Path) -> Iterator[Verdict]:
    """Build one trial for each instrument on one base, verify both, then the answer to a request.

    Raises:
        RuntimeError: a trial that does not run, whatever its checks say.
    """
    tokens = prepare(case.workload, folder).path
    shared = SharedBase()
    trials = {}
    for instrument in INSTRUMENTS:
        trials[instrument] = trial = Trial(_request(case, instrument, tokens, folder), shared)
        _ran(case, trial.run("build"))
        shapes = tuple(parameter.numel() for parameter in trial._built.trainee.parameters)
        packed = case.workload.layout == "packed"
        required = requirements_of(case.variant, shapes, packed=packed) | dict(case.requirements)
        found = trial.run("verify")
        verdict = _verdict(case, "train", instrument, required, found.checks)
        if not verdict.alarms:
            _ran(case, found)
        yield verdict
    trial = trials["profile"]
    answer = _ran(case, trial.run("begin_generate")).tokens["completion"]
    if len(answer) != case.workload.new_tokens:
        raise RuntimeError(f"{case.name}: {len(answer)} tokens generated, {case.workload.new_tokens} asked for")
    served = dataclasses.replace(case.variant, autocast=None)  # requests run outside autocast, which is a step's
    required = requirements_of(served, shapes, packed=packed)
    required = {path: value for path, value in required.items() if path in WHILE_GENERATING} | {"mode": "eval"}
    model = trial._built.trainee.model
    for instrument in INSTRUMENTS:
        found = kernels_check.verify(model, lambda: trial.run("request"), required, instrument=instrument)
        yield _verdict(case, "generate", instrument, required, tuple(codec.to_json(check) for check in found))


def judge_twin(name: str) -> Iterator[Verdict]:
    """Build a healthy twin for each instrument, and verify it.

    Raises:
        SkippedError: it cannot be built here.
    """
    for instrument in INSTRUMENTS:
        run = MAKERS[name]()
        found = kernels_check.verify(run.model, run.step, run.required, batch=run.batch, instrument=instrument)
        yield _twin_verdict(name, "-", instrument, run.required, [codec.to_json(check) for check in found])


def judge_ranks(name: str) -> Iterator[Verdict]:
    """Verify a run of two ranks in both."""
    for instrument in INSTRUMENTS:
        required, ranks = verified(name, instrument)
        for rank, checks in enumerate(ranks):
            yield _twin_verdict(name, f"rank {rank}", instrument, required, checks)


def _twin_verdict(name: str, model: str, instrument: str, required: Mapping[str, Any], checks: Any) -> Verdict:
    return Verdict(
        case=name, model=model, phase="train", instrument=instrument, required=required, checks=tuple(checks)
    )


def _request(case: Case, instrument: str, tokens: str, folder: Path) -> TrialRequest:
    return TrialRequest(
        trial=f"{case.variant.name}-{instrument}", variant=case.variant, role="variant", replicate=0, seed=0,
        workload=case.workload, protocol=Protocol().least(), interleaving="replicates", measures=("requests",),
        instrument=instrument, device="cuda" if torch.cuda.is_available() else "cpu", threads=1, tokens_path=tokens,
        scratch=str(folder), log_path="", requirements=dict(case.requirements),
    )  # fmt: skip


def _ran(case: Case, fragment: Fragment) -> Fragment:
    if fragment.status != "ok":
        raise RuntimeError(f"{case.name}: {fragment.failure}")
    return fragment


def _verdict(case: Case, phase: str, instrument: str, required: Mapping[str, Any], checks: Any) -> Verdict:
    return Verdict(
        case=case.name, model=case.workload.model, phase=phase, instrument=instrument, required=required,
        checks=tuple(checks),
    )  # fmt: skip


def by_case(verdicts: list[Verdict]) -> Table:
    """One row a case: active of required paths, for each phase and instrument."""
    table = Table(title="Active of required paths", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("variant", overflow="fold")
    columns = list(itertools.product(("train", "generate"), INSTRUMENTS))
    for phase, instrument in columns:
        table.add_column(f"{phase},\n{instrument}", justify="right")
    table.add_column("left out by the spy", overflow="fold")
    rows: dict[tuple[str, str], dict[tuple[str, str], Verdict]] = {}
    for verdict in verdicts:
        rows.setdefault((verdict.model, verdict.case), {})[verdict.phase, verdict.instrument] = verdict
    for (model, case), cells in rows.items():
        spied = [verdict.left_out for (_, instrument), verdict in cells.items() if instrument == "spy"]
        table.add_row(
            model,
            case,
            *(_counted(cells.get(column)) for column in columns),
            ", ".join(dict.fromkeys(itertools.chain.from_iterable(spied))) or "-",
        )
    return table


def _counted(verdict: Verdict | None) -> str:
    return "-" if verdict is None else f"{len(verdict.active)} of {len(verdict.required)}"


def by_path(verdicts: list[Verdict]) -> Table:
    """One row a path: in how many verifications it was required and active, and which values were."""
    table = Table(title="The same by path", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("path")
    for instrument in INSTRUMENTS:
        for heading in ("required", "active", "left out"):
            table.add_column(f"{instrument},\n{heading}", justify="right")
    table.add_column("values required", overflow="fold")
    for path in kernels_check.REQUIREMENTS:
        asked = [verdict for verdict in verdicts if path in verdict.required]
        if not asked:
            continue
        cells = []
        for instrument in INSTRUMENTS:
            some = [verdict for verdict in asked if verdict.instrument == instrument]
            active, left_out = ([path in one.active for one in some], [path in one.left_out for one in some])
            cells += [str(len(some)), str(sum(active)), str(sum(left_out))]
        values = dict.fromkeys(str(verdict.required[path]) for verdict in asked)
        table.add_row(path, *cells, ", ".join(values))
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run all cases; 0 without a false alarm, 1 with any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), metavar="MODEL", help="models, by any name")
    parser.add_argument("--twins", metavar="NAME", help="only the healthy twins with this in their names")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    verdicts = list[Verdict]()
    for model in options.model if options.twins is None else ():
        for case in cases(model):
            print(f"{model}, {case.name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                verdicts += judge(case, Path(folder))
    alarms, skipped = list[str](), list[str]()
    for name in (name for name in (*MAKERS, *RANKED) if (options.twins or "") in name):
        print(name, file=sys.stderr, flush=True)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # a Trainer prints what it logs
                found = [*(judge_ranks(name) if name in RANKED else judge_twin(name))]
        except SkippedError as reason:
            skipped.append(f"{name}: {reason}")
        except Exception as error:
            alarms.append(f"{name}: raised {error!r}")
        else:
            if name in RANKED and RANKED[name].sick:
                alarms += [f"{name}, {one.model}, {one.instrument}: not found" for one in found if not one.alarms]
            else:
                verdicts += found
    console = Console(width=120, highlight=False)
    console.print(by_case(verdicts))
    console.print(by_path(verdicts))
    alarms += [alarm for verdict in verdicts for alarm in verdict.alarms]
    for one in skipped:
        console.print(Text(f"skipped: {one}"))
    for alarm in alarms:
        console.print(Text(f"false alarm: {alarm}"))
    judged = sum(len(verdict.active) for verdict in verdicts)
    if not alarms:
        console.print(f"holds: no false alarm in {judged} judged claims of {len(verdicts)} verifications")
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
