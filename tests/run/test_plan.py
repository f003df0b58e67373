"""Tests of the plan: every variant once in each replicate, shuffled by a recorded seed, with the control.

Tests of the finest interleaving that the variants and the memory allow.

Tests that infeasible settings are refused before a model is loaded.

Tests of PEFT methods and full fine-tuning, measured through the command line with their checks.

Tests of a study on a user's own data, from its plan to its report.

Tests of a model with unknown layers: nothing is refused on a guess, and unknown values are reported as unknown.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.machine.provenance import probe_machine
from lorameter.models import methods
from lorameter.records import store
from lorameter.run.build_plan import MEMORY_SHARE, build_plan, choose_interleaving, shared_base_obstacle
from lorameter.run.feasibility import check_feasible
from lorameter.run.plan import build_arms, make_plan
from lorameter.studies.claim import Engine
from lorameter.studies.commands import study_of_engine
from lorameter.studies.study_file import load_study
from lorameter.studies.variant import LoraVariant
from lorameter.trial.building import method_probe


def test_every_replicate_holds_every_variant_and_the_control_once(small_study):
    """Replicates are complete blocks, so that drift affects all variants alike."""
    plan = make_plan(small_study)
    for replicate in range(small_study.protocol.replicates):
        members = Counter((s.variant.name, s.arm.role) for s in plan.slots if s.replicate == replicate)
        assert members == {("plain", "variant"): 1, ("nf4", "variant"): 1, ("plain", "control"): 1}
    assert len({slot.trial for slot in plan.slots}) == len(plan.slots)


def test_selecting_never_drops_the_reference_or_the_control(small_study):
    """A ratio needs the reference, and a run needs the control."""
    assert [one.name for one in build_arms(small_study, ["nf4"])] == ["plain", "nf4", "plain-control"]
    assert [one.name for one in build_arms(small_study, ["plain"])] == ["plain", "plain-control"]


def test_the_seed_fixes_the_order_and_another_seed_changes_it(small_study):
    """The manifest reproduces the order."""

    def order(seed):
        protocol = dataclasses.replace(small_study.protocol, seed=seed, replicates=8)
        return [slot.trial for slot in make_plan(dataclasses.replace(small_study, protocol=protocol)).slots]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_trials_of_a_replicate_share_their_seed(small_study):
    """Paired trials differ only in the variant."""
    plan = make_plan(small_study)
    seeds = {slot.replicate: set() for slot in plan.slots}
    for slot in plan.slots:
        seeds[slot.replicate].add(slot.seed)
    assert all(len(values) == 1 for values in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds)


def test_a_phase_that_is_not_known_is_refused(small_study):
    """The error names the phase."""
    with pytest.raises(UsageError, match="training"):
        make_plan(small_study, phases=["training"])


@pytest.mark.parametrize(("level", "processes"), [("shared-base", 1), ("lockstep", 3)])
def test_trials_that_take_turns_are_in_one_group(small_study, level, processes):
    """The group has all variants and the control, in one process or one process each, with a new order in every
    round."""
    protocol = dataclasses.replace(small_study.protocol, turns=30)
    plan = make_plan(dataclasses.replace(small_study, protocol=protocol), interleaving=level, phases=["train"])
    groups = [group for group in plan.groups if group.replicate == 0 and group.turns]
    assert [len(group.launches) for group in groups] == [processes]
    assert Counter(trial for order in groups[0].turns for trial in order) == {
        "r0-plain": 30, "r0-nf4": 30, "r0-plain-control": 30,
    }  # fmt: skip
    assert len(set(groups[0].turns)) == 6


def test_no_metric_is_measured_by_two_kinds_of_trials(small_study):
    """Trials in turns and isolated trials measure disjoint sets of metrics, and together all metrics."""
    phases = ["train", "generate", "cold"]
    everything = set(make_plan(small_study, phases=phases).slots[0].measures)
    for level in ("shared-base", "lockstep"):
        kinds = {slot.measures for slot in make_plan(small_study, interleaving=level, phases=phases).slots}
        first, second = kinds
        assert not set(first) & set(second)
        assert set(first) | set(second) == everything


def test_whole_answers_are_measured_if_the_workload_limits_their_tokens(small_study):
    """A workload without a token limit for them has none; a protocol without merged requests has none."""
    workload = dataclasses.replace(small_study.workload, open_ended_tokens=8)
    study = dataclasses.replace(small_study, workload=workload)
    assert all("open_ended" in slot.measures for slot in make_plan(study).slots)
    assert not any("open_ended" in slot.measures for slot in make_plan(small_study).slots)
    unmerged = dataclasses.replace(study, protocol=dataclasses.replace(study.protocol, merged=False))
    assert not any("merged" in slot.measures for slot in make_plan(unmerged).slots)


R8 = LoraVariant(name="r8", r=8)
SWEEP = (
    R8,
    LoraVariant(name="r64", r=64, lora_alpha=128, lora_dropout=0.1, use_rslora=True, target_modules=("q_proj",)),
)
MIXED = (R8, LoraVariant(name="nf4", r=8, quantization="nf4"))
GIB = 2**30


def test_variants_that_differ_in_their_adapters_share_a_base():
    """The memory does not matter, since the base is loaded once."""
    assert choose_interleaving(SWEEP, together_bytes=900 * GIB, free_bytes=GIB)[0] == "shared-base"


def test_other_variants_take_turns_in_processes_that_fit_together():
    """The reason gives the difference and both sizes."""
    level, why = choose_interleaving(MIXED, together_bytes=3 * GIB, free_bytes=8 * GIB)
    assert level == "lockstep"
    assert "nf4 differs from r8 in quantization" in why
    assert "3 GiB of 8 GiB" in why


def test_variants_that_do_not_fit_together_run_one_after_the_other():
    """The forecast must leave memory free, since a swapping machine measures nothing."""
    free = 8 * GIB
    assert choose_interleaving(MIXED, together_bytes=int(MEMORY_SHARE * free), free_bytes=free)[0] == "lockstep"
    assert choose_interleaving(MIXED, together_bytes=int(MEMORY_SHARE * free) + 1, free_bytes=free)[0] == "replicates"
    assert choose_interleaving(MIXED, together_bytes=1, free_bytes=None)[0] == "replicates"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"init_lora_weights": "olora"}, "rewrites the base"),
        ({"init_lora_weights": "pissa"}, "rewrites the base"),
        ({"bias": "all"}, "biases"),
        ({"bias": "lora_only"}, "biases"),
        ({"compile": True}, "recompile"),
        ({"liger_kernel": True}, "whole process"),
        ({"merge_adapter": True}, "changes the base during its requests"),
        ({"kv_cache": "static"}, "kv_cache"),
        ({"attention": "eager"}, "attention"),
        ({"optimizer": "adamw"}, "optimizer"),
        ({"dtype": "float32"}, "dtype"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
    ],
)
def test_variants_that_change_the_base_cannot_share_it(changes, word):
    """Each exclusion is found and named, also if only one variant has it."""
    obstacle = shared_base_obstacle((R8, dataclasses.replace(R8, name="other", **changes)))
    assert obstacle is not None
    assert obstacle.startswith("other")
    assert word in obstacle


@pytest.mark.parametrize(("device", "level"), [("cpu", "lockstep"), ("cuda", "shared-base")])
def test_on_a_cpu_variants_on_one_base_have_a_heap_each(small_study, device, level):
    """On a CPU each variant has its own process; on a GPU, whose allocator keeps its blocks, they share one."""
    machine = dataclasses.replace(probe_machine(), device=device)
    study = dataclasses.replace(small_study, variants=tuple(
        dataclasses.replace(small_study.variants[0], name=f"r{r}", r=r) for r in (4, 8)
    ), reference="r4", claims=())  # fmt: skip
    plan, _ = build_plan(study, machine, free_bytes=64 * GIB)
    assert plan.interleaving == level


def test_a_level_can_be_requested():
    """A coarser level is always accepted, shared-base only if the variants allow it, an unknown word never."""
    assert choose_interleaving(SWEEP, together_bytes=0, free_bytes=None, requested="replicates") == (
        "replicates",
        "requested",
    )
    with pytest.raises(UsageError, match=r"nf4 differs from r8 in quantization.*Use lockstep"):
        choose_interleaving(MIXED, together_bytes=0, free_bytes=None, requested="shared-base")
    with pytest.raises(UsageError, match="interleave = 'shuffle'"):
        choose_interleaving(SWEEP, together_bytes=0, free_bytes=None, requested="shuffle")


def test_several_adapters_on_a_base_are_those_of_one_trial():
    """Switching iterates over all adapters of a base, so that other trials' adapters would add to its time."""
    sizes = {"together_bytes": 3 * GIB, "free_bytes": 8 * GIB, "adapters": 4}
    assert choose_interleaving(SWEEP, **sizes)[0] == "lockstep"
    with pytest.raises(UsageError, match="requests have 4 adapters on a base"):
        choose_interleaving(SWEEP, **sizes, requested="shared-base")


def with_variant(study, **changes):
    return dataclasses.replace(study, variants=(dataclasses.replace(study.variants[0], **changes),))


def with_workload(study, **changes):
    return dataclasses.replace(study, workload=dataclasses.replace(study.workload, **changes))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_this_device_lacks_is_refused(small_study, machine, attention):
    """The error names study, variant, key, value and an alternative."""
    with pytest.raises(UsageError) as caught:
        check_feasible(with_variant(small_study, attention=attention), machine)
    for word in ("small", "'plain'", f"attention = '{attention}'", "CPU", "sdpa"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["liger-kernel", "flash-attention"])
def test_an_engine_that_needs_a_gpu_is_refused_on_a_cpu(machine, name):
    """The error is one sentence, also for a script; a dry run gives a notice instead."""
    study = load_study(name)
    script = study_of_engine(study, "python train.py {--flag}", cwd=str(Path(__file__).parent))
    for one in (study, script):
        with pytest.raises(UsageError) as caught:
            check_feasible(one, machine)
        assert re.fullmatch(rf"study {name}: [^.]* runs on a GPU only [^.]*\.", str(caught.value))
    assert [one.code for one in check_feasible(study, machine, shown_only=True)] == ["needs-gpu"]


def test_a_width_that_blocks_do_not_divide_is_refused(small_study, machine, tmp_path):
    """The check applies only to CPUs with AVX512-BF16 and to 4-bit layers."""
    import json

    config = {
        "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 300,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    study = with_workload(with_variant(small_study, quantization="nf4"), model=f"random:{tmp_path}")
    with pytest.raises(UsageError, match="hidden_size is 96"):
        check_feasible(study, machine)
    check_feasible(study, dataclasses.replace(machine, avx512_bf16=False))
    check_feasible(with_variant(study, quantization="none"), machine)


@pytest.mark.parametrize("change", [{"sequence_length": 4096}, {"prompt_tokens": 2000, "new_tokens": 200}])
def test_more_tokens_than_the_context_are_refused(small_study, machine, change):
    """The context of tiny-llama is 2048 tokens."""
    with pytest.raises(UsageError, match="2048"):
        check_feasible(with_workload(small_study, **change), machine)


def test_a_missing_data_file_is_refused(small_study, machine):
    """The error comes before the worker starts."""
    with pytest.raises(UsageError, match="no such file"):
        check_feasible(with_workload(small_study, data="./nothing.jsonl"), machine)


def test_an_unknown_model_is_refused(small_study, machine):
    """The error lists the known names."""
    with pytest.raises(UsageError, match="tiny-llama"):
        check_feasible(with_workload(small_study, model="tiny-lama"), machine)


def test_unusual_settings_give_a_notice(small_study, machine):
    """A paged optimizer on a CPU and random weights give notices."""
    codes = {n.code for n in check_feasible(with_variant(small_study, r=300, optimizer="paged_adamw_32bit"), machine)}
    assert codes == {"paged-on-cpu", "random-weights"}
    assert {n.code for n in check_feasible(small_study, machine)} == {"random-weights"}


def test_an_unknown_path_in_a_proof_is_refused(small_study, machine):
    """An unknown path in a proof is refused with the known ones before the measurement."""
    engine = Engine(title="packing", variant="nf4", proof={"padding.shar": "less"})
    with pytest.raises(UsageError, match=r"padding.shar: no path of kernels_check.*padding.share"):
        check_feasible(dataclasses.replace(small_study, engine=engine), machine)


def test_a_request_of_many_prompts_that_cannot_fit_is_refused(small_study, machine):
    """The KV cache of a large request exceeds the memory; a run without requests is accepted."""
    study = with_workload(small_study, model="random:smollm2-135m", request_batch=4096, prompt_tokens=1024)
    with pytest.raises(UsageError, match=r"needs about .* Use a smaller request_batch"):
        check_feasible(study, machine)
    check_feasible(study, machine, phases=("train",))


@pytest.mark.parametrize(
    ("variant", "workload", "message"),
    [
        (
            {"use_dora": True},
            {"request_batch": 2},
            r"use_dora = True: with adapters = 4, PEFT does not mix .* = 1, which",
        ),
        ({"merge_adapter": True}, {}, "merge_adapter = True: with adapters = 4, a merged adapter can neither"),
        ({"bias": "lora_only"}, {}, 'bias = .lora_only.: with adapters = 4, PEFT has one .* Use bias = "none"'),
        ({"init_lora_weights": "olora"}, {}, "init_lora_weights = .olora.: with adapters = 4, it rewrites the base"),
    ],
)
def test_adapters_of_which_peft_has_one_at_a_time_are_refused(small_study, machine, variant, workload, message):
    """The error applies only to several adapters and comes before loading; DoRA adapters can be switched but not
    mixed."""
    one, *others = small_study.variants
    study = dataclasses.replace(small_study, variants=(dataclasses.replace(one, **variant), *others))
    with pytest.raises(UsageError, match=f"variant '{one.name}': {message}"):
        check_feasible(with_workload(study, adapters=4, **workload), machine)
    check_feasible(with_workload(study, **workload), machine)
    if "use_dora" in variant:
        check_feasible(with_workload(study, adapters=4), machine)


STUDY = """
[workload]
model = "random:tiny-llama"
layout = "bucketed"
sequence_length = 32
train_sequences = 64

[protocol]
replicates = 1
turns = 1
allow_disturbed = true
warmup_steps_max = 3

[[variant]]
name = "lora"
optimizer = "lora+"
optimizer_args = { loraplus_lr_ratio = 16 }

[[variant]]
name = "ia3"
quantization = "nf4"
autocast = "bfloat16"
peft = { peft_type = "IA3" }

[[variant]]
name = "prompt"
optimizer = "Adafactor"
peft = { peft_type = "PROMPT_TUNING", num_virtual_tokens = 4 }

[[variant]]
name = "vera"
peft = "VERA"

[[variant]]
name = "full"
method = "full"
"""


@pytest.fixture(autouse=True, scope="module")
def nothing_is_known_of_methods(tmp_path_factory):
    """Use an empty cache, so that the methods are probed again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAMETER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def run(folder, text, *options):
    path = folder / "methods.toml"
    path.write_text(text)
    return main(["run", str(path), "--runs-dir", str(folder / "runs"), *options])


def test_methods_train_with_their_checks(tmp_path, capsys):
    """Each method has a learning adapter and a frozen base; in full fine-tuning the base learns."""
    saved = tmp_path / "adapter_config.json"
    saved.write_text(json.dumps({"peft_type": "VERA", "r": 16, "inference_mode": True, "peft_version": "0.1"}))
    options = ("--interleave", "replicates", "--phase", "train")
    assert run(tmp_path, STUDY.replace('"VERA"', f'"{tmp_path}"'), *options) == 0
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    records = {one.name: one for one in store.read_run(str(folder), tmp_path / "runs").records if one.checks}
    assert set(records) == {"lora", "ia3", "prompt", "vera", "full"}
    for name, record in records.items():
        found = {check["path"]: check["status"] for check in record.checks}
        wanted = ["base.learning"] if name == "full" else ["peft.attached", "peft.learning", "base.frozen"]
        assert [found[path] for path in wanted] == ["active"] * len(wanted), name
    assert records["full"].values["trainable_parameters"] > 10 * records["lora"].values["trainable_parameters"]


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ('peft = { peft_type = "VERRA" }', "has no such method. Did you mean 'VERA'?"),
        ('peft = { peft_type = "VERA", rr = 4 }', "peft.rr = 4: VeraConfig has no such field. Did you mean 'r'?"),
        ('peft = { peft_type = "ADALORA", init_r = 12 }\nmerge_adapter = 3', "merge_adapter"),
        ('optimizer = "Adafactr"', "Did you mean 'Adafactor'?"),
        ('method = "full"\nquantization = "nf4"', "quantised weights do not train"),
        ('method = "full"\nr = 8', "the variant is full fine-tuning"),
        ('peft = { peft_type = "IA3" }\nr = 8', "r = 8: the variant is a method of PEFT"),
        ('peft = "nowhere.json"', "Name an adapter_config.json or its folder"),
        ('optimizer = "lora+"\noptimizer_args = { lr_ratio = 16 }', "loraplus_lr_ratio"),
    ],
)
def test_invalid_methods_are_refused_before_anything_runs(tmp_path, capsys, monkeypatch, variant, message):
    """The error is one sentence with the closest valid word. Methods are probed in this process, which has imported
    PEFT."""
    monkeypatch.setattr(methods, "_probe", lambda variants: tuple(map(method_probe.probe, variants)))
    assert run(tmp_path, f'[workload]\nmodel = "random:tiny-llama"\n[[variant]]\nname = "one"\n{variant}\n') == 2
    assert message in " ".join(capsys.readouterr().err.split())


STUDY_OWN_DATA = """
title = "own"

[workload]
model = "tiny-llama"
data = "chats.jsonl"
loss = "answer"
sequence_length = 64
batch_size = 2
train_sequences = 16
held_out_records = 4
held_out_sequences = 2
prompt_tokens = 8
new_tokens = 4

[protocol]
replicates = 1
warmup_steps_min = 1
warmup_steps_max = 2
turns = 2
steps_per_turn = 2
phases = ["train"]
step_timeout_s = 120
allow_disturbed = true

[[variant]]
name = "plain"
r = 4
"""


def test_a_plan_describes_the_data(tmp_path, monkeypatch, capsys):
    """The plan has a line on the user's data; a plan on generated records has none."""
    turns = [
        [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"{number}!"}]
        for number in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in turns))
    (tmp_path / "own.toml").write_text(STUDY_OWN_DATA)
    monkeypatch.chdir(tmp_path)
    words = ["run", "own.toml", "--dry-run", "--json", "--runs-dir", "runs"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["data"] == (
        "chats.jsonl, 60 records of messages; loss on the answers alone"
    )
    assert main([*words, "--data", "synthetic"]) == 0
    assert "data" not in json.loads(capsys.readouterr().out)


CONFIG = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 100, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 4096, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
"""A width that is not a multiple of 64, as a linear layer in 4 bits would need."""
SENTENCE = "the linear layers of model type 'mixtral' are not known"
REMEDY = "add an entry for it to harness/lorameter/models/shapes.py"


@pytest.fixture
def model(tmp_path):
    """The model's name in a study."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return f"random:{tmp_path}"


@pytest.fixture
def study(small_study, model):
    """A small study on this model."""
    return dataclasses.replace(small_study, workload=dataclasses.replace(small_study.workload, model=model))


def test_unknown_families_are_not_refused(study, machine):
    """Memory, widths and ranks are not checked; one notice has what is unknown and the remedy."""
    tiny = dataclasses.replace(machine, memory_bytes=1)
    wide = dataclasses.replace(
        study, variants=(*study.variants, dataclasses.replace(study.variants[0], name="r", r=999))
    )
    (layers, weights) = check_feasible(wide, tiny)
    assert (layers.code, weights.code) == ("layers-unknown", "random-weights")
    assert SENTENCE in layers.message
    assert REMEDY in layers.message


def test_a_dry_run_gives_the_reason(model, capsys, tmp_path):
    """Unknown numbers are null in JSON, with the reason; the time is that of its steps."""
    words = ["run", "lora-or-qlora", "--dry-run", "--json", "--interleave", "lockstep", "--model", model]
    assert main([*words, "--runs-dir", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["time_s"] > 0
    assert document["memory_bytes"] is document["disk_bytes"] is None
    assert SENTENCE in document["unknown"]


def test_sizes_are_counted_by_peft_and_noted_as_unconfirmed(tmp_path, capsys):
    """Sizes are counted without a formula, and a note says that no formula confirmed them."""
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.toml").write_text('[[variant]]\nname = "r64"\nr = 64\ntarget_modules = []\n')
    line = ["list", "sizes", str(tmp_path / "own.toml"), "--model", f"random:{tmp_path}"]
    assert main(line) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "32,768" in shown  # r 64, two blocks, 64 in and 192 out
    assert "the linear layers of model type 'gpt2' are not known" in shown
    assert main([*line, "--json"]) == 0
    assert "'gpt2'" in json.loads(capsys.readouterr().out)["unknown"]
