"""Shared fixtures: a described machine, a small study, and one real executor for the tests that need processes."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

from lorameter.machine.provenance import Machine
from lorameter.records import codec
from lorameter.studies.protocol import Protocol
from lorameter.studies.study import Study
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload

pytest_plugins = ["pytester"]
HERE = Path(__file__).parent
OLD_PACKAGING = "packaging==24.2"
QUICK = ("stats", "studies", "records", "verdicts", "results")
"""Folders of tests that are distributed to the processes last, so that none of them ends much later than the others."""

gc.disable()  # until all tests are collected: garbage collection would take half of that time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two OpenMP threads on two cores are very slow under contention
INPUTS = tuple(f"LORAMETER_{name}" for name in "CACHE CONTRACT DOLLY GEMMA NOISE TRACES".split())
"""Variables that name inputs of tests; any other variable of lorameter would change what tests measure, or where."""
for name in [name for name in os.environ if name.startswith("LORAMETER_") and name not in INPUTS]:
    del os.environ[name]
OWN = ("LORAMETER_LOCKS", "LORAMETER_BASES")
for name in OWN:  # folders of this process, since other test processes measure too; nothing reuses what tests prepare
    os.environ[name] = tempfile.mkdtemp(prefix="lorameter-tests-")
os.environ.pop("COLUMNS", None)  # it sets the width of reports, and xdist sets it in its processes
os.environ.pop("PYTEST_XDIST_WORKER", None)  # otherwise a pytest that a test starts would act as an xdist worker

# How long an example takes depends on the machine and its load.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def pytest_collection_modifyitems(config, items):
    """GPU tests give the reason of their skip; slow tests are deselected unless `-m selftest` or `-m faults` selects
    them (make proof-long); quick tests come last."""
    for marker in ("selftest", "faults"):
        if marker not in config.option.markexpr:
            long = {item for item in items if item.get_closest_marker(marker) and HERE in item.path.parents}
            config.hook.pytest_deselected(items=list(long))
            items[:] = [item for item in items if item not in long]
    items.sort(key=lambda item: HERE in item.path.parents and item.path.relative_to(HERE).parts[0] in QUICK)

    for_gpus = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpus and not _has_gpu():
        for item in for_gpus:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def _has_gpu():
    import torch

    return torch.cuda.is_available()


def pytest_collection_finish():
    """Freeze the objects that exist after the collection, which stay until the end."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    """Remove the prepared bases, which are as large as models, also in the controlling process of xdist."""
    for name in OWN:
        shutil.rmtree(os.environ[name], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def signals_reach_child_processes():
    """Handle SIGINT and SIGHUP where the shell ignores them (background jobs, `nohup`), since processes of the tests
    would inherit that; a handler is not inherited."""
    ignored = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None))
        if signal.getsignal(number) is signal.SIG_IGN
    }
    yield
    for number, before in ignored.items():
        signal.signal(number, before)


@pytest.fixture(scope="module", autouse=True)
def imported_objects_are_not_collected():
    """Exclude imported objects from garbage collection, as the zygote does.

    The phases of a trial end with a full collection, which takes 0.4 s in a process that has imported every library;
    that was a third of the time of the tests that train.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_steps_are_timed(monkeypatch):
    """Replace the process that times steps for a forecast by constant times."""
    from lorameter.run import forecast

    time_steps = forecast.time_steps

    def constant_times(plan, executor, if_busy="refuse"):
        found = time_steps(plan, None)
        if executor is None or not plan.study.supports("built"):
            return found
        times = forecast.TrialTimes(step_s=0.5, evaluate_s=0.5, request_s=0.5, load_s=0.5)
        trials = {arm.variant.name: times for arm in plan.arms}
        return forecast.PlanTimes(import_s=4.0, trials=trials, parallel=2, basis="simulated times")

    monkeypatch.setattr(forecast, "time_steps", constant_times)


@pytest.fixture
def machine() -> Machine:
    """A CPU machine with AVX512-BF16, described and not probed."""
    return Machine(
        device="cpu", device_name="Test CPU", device_memory_bytes=None, driver=None, cuda=None, cpu_model="Test CPU",
        cpus=2, memory_bytes=8 * 2**30, avx512_bf16=True, kernel="6.0", python="3.11.0",
        gflops={"float32": 100.0, "bfloat16": 170.0, "float16": 40.0},
    )  # fmt: skip


@pytest.fixture(scope="session")
def small_study() -> Study:
    """A study of two variants and two replicates with minimal work, which is valid however busy the machine is."""
    return Study(
        name="small",
        title="small",
        workload=Workload(
            sequence_length=32, batch_size=2, train_sequences=16, held_out_records=4, held_out_sequences=2,
            prompt_tokens=8, new_tokens=4,
        ),
        protocol=Protocol(
            replicates=2, warmup_steps_min=1, warmup_steps_max=2, turns=2, steps_per_turn=2, generate_warmup=0,
            generate_requests=2, step_timeout_s=120, allow_disturbed=True,
        ),
        variants=(LoraVariant(name="plain", r=4), LoraVariant(name="nf4", r=4, quantization="nf4")),
        reference="plain",
    )  # fmt: skip


@pytest.fixture
def dolly() -> Path:
    """The real data set from $LORAMETER_DOLLY or from a folder `shared` next to the checkout; skips without it."""
    default = Path(__file__).parents[2] / "shared" / "data" / "databricks-dolly-15k.jsonl.gz"
    path = Path(os.environ.get("LORAMETER_DOLLY", default))
    if not path.is_file():
        pytest.skip("$LORAMETER_DOLLY does not name databricks-dolly-15k.jsonl.gz")
    return path


@pytest.fixture(scope="session")
def words():
    """The vocabulary of `gguf_file`: token 1 begins and token 2 ends a text."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return ["<unk>", "<s>", "</s>", *(bytes_to_unicode()[byte] for byte in range(256)), "ta", "tab"]


@pytest.fixture(scope="session")
def gguf_file(words, tmp_path_factory):
    """A small tied Llama with Q8_0 linear layers and a GPT-2 style tokenizer, as llama.cpp writes it."""
    import numpy as np

    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(192)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["t a", "ta b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(5)
    shapes = {"attn_q": (128, 128), "attn_k": (64, 128), "attn_v": (64, 128), "attn_output": (128, 128)}
    shapes |= {"ffn_gate": (192, 128), "ffn_up": (192, 128), "ffn_down": (128, 192)}
    writer.add_tensor("token_embd.weight", random.normal(0, 0.02, (len(words), 128)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(128, np.float32))
    for block in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{norm}.weight", np.ones(128, np.float32))
        for name, shape in shapes.items():
            weight = random.normal(0, 0.02, shape).astype(np.float32)
            packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.{block}.{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FACTS = {
    "device": "cpu", "device_name": "Test CPU", "driver": None, "cuda": None, "cpu_model": "Test CPU", "threads": 1,
    "python": "3.11.0", "libraries": dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1.0"),
    "workload": {"model": "tiny-llama", "batch_size": 2}, "git": {"commit": None, "dirty": None},
}  # fmt: skip


@pytest.fixture
def write_run(tmp_path: Path, small_study: Study):
    """A function that writes a whole run with exact numbers, as the runner would, and returns its directory.

    `steps` are the step times of each variant, one for each replicate; the control has the reference's, times
    `control`. `facts` replaces fields of the provenance; `change` changes any record before it is written.
    """
    from lorameter.machine import provenance
    from lorameter.records.record import TrialRecord
    from lorameter.records.store import Manifest, RunWriter

    def write(
        name, steps, *, study=small_study, control=1.0, facts=None, status="complete", change=lambda record: record,
        phases=("train",), peak=2**20, own_workloads=None, skipped=(),
    ):  # fmt: skip
        known = FACTS | (facts or {})
        shutil.rmtree(tmp_path / "runs" / name, ignore_errors=True)
        rows = [(variant, "variant", times) for variant, times in steps.items()]
        if study.reference in steps and control:
            rows.append((study.reference, "control", [time * control for time in steps[study.reference]]))
        records = []
        for variant, role, times in rows:
            for replicate, time in enumerate(times):
                samples = {
                    "step_time_s": (time * 0.99, time, time * 1.01), "turn_tokens": (64.0,) * 3,
                    "turn_sequences": (2.0,) * 3, "timed_loss": (2.0,) * 3,
                }  # fmt: skip
                if "generate" in phases:
                    samples["request_time_s"] = (3 * time,)
                suffix = "-control" if role == "control" else ""
                records.append(TrialRecord(
                    trial=f"r{replicate}-{variant}{suffix}", status="ok", name=variant, role=role, replicate=replicate,
                    variant=study.variant(variant).id, position=len(records), interleaving="replicates", seed=0,
                    started_unix_s=0.0, wall_time_s=1.0, samples=samples, memory={"host_peak_train_bytes": peak},
                    turn_lengths=(3,),
                    checks=({"path": "base.bits", "required": 16, "observed": 16, "status": "active", "reason": ""},),
                ))  # fmt: skip
        writer = RunWriter(tmp_path / "runs", Manifest(
            run=name, study=codec.to_json(study), phases=phases, interleaving="replicates", seed=0,
            order=tuple(record.trial for record in records), created_unix_s=1.0, provenance=known,
            fingerprint=provenance.fingerprint(known), own_workloads=codec.to_json(own_workloads or {}),
            skipped=skipped,
        ))  # fmt: skip
        for record in records:
            writer.append(change(record))
        writer.finish(status)
        return writer.path

    return write


@pytest.fixture
def sft_command(tmp_path):
    """The command `trl sft` on a small model and records in this folder, without steps and rank; skips where TRL is not
    installed."""
    program = Path(sys.executable).with_name("trl")
    if importlib.util.find_spec("trl") is None or not program.is_file():
        pytest.skip("needs trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(words))).save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": " ".join("abcdefgh"[place % 8 :] * 3)}) for place in range(400)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    return (
        f"{program} sft --model_name_or_path model --dataset_name data --output_dir out --use_peft "
        "--lora_target_modules all-linear --use_cpu --bf16 false --report_to none"
    )


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    """A requirement on a reachable package index that is pure, small and older than any version that lorameter's
    dependencies need; skips without an index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run(
        [*command, str(tmp_path_factory.mktemp("index")), OLD_PACKAGING], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no package index is reachable: {done.stderr.strip().splitlines()[-1:]}")
    return OLD_PACKAGING
