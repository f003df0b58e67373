"""Tests that a watched step has the same result as an unwatched one, and that checks are reported even if it fails.

Tests of ``watch`` in callbacks of real trainers: it is opened in one callback and closed in another.
"""

import copy
import gc
import io
import weakref
from contextlib import ExitStack

import peft
import pytest
import torch
from negative_controls.small_run import build, forget_compilations
from torch.profiler import ProfilerActivity, profile
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import kernels_check
from kernels_check.judges.paths import PATHS
from kernels_check.observe import calls
from kernels_check.observe.execution import read_compilations
from kernels_check.observe.profile import is_recording

REQUIRED = {"attention.backend": "flash", "base.frozen": True, "mode": "train", "peft.attached": True}


def _traces(model):
    """Return everything that a check could leave in the process or on the model."""
    from torch.optim import optimizer

    hooks = [one for module in model.modules() for one in (module._forward_hooks, module._forward_pre_hooks)]
    tensor_hooks = [value._backward_hooks for value in model.parameters()]
    return (
        sum(map(len, hooks)),
        sum(map(bool, tensor_hooks)),
        len(optimizer._global_optimizer_pre_hooks),
        len(optimizer._global_optimizer_post_hooks),
        id(torch.autograd.profiler._enable_profiler),
        len(torch._dynamo.callback_handler.start_callbacks),
        is_recording(),
        torch._dynamo.eval_frame._stance.stance,
    )


def _state(run):
    """Return what a step may change: weights, buffers, gradients, optimizer state, random state, losses."""
    model = run.model
    held = [*model.named_parameters(), *model.named_buffers()]
    return copy.deepcopy({
        "values": {name: value.detach() for name, value in held},
        "gradients": {name: value.grad for name, value in model.named_parameters()},
        "optimizer": run.optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "losses": run.losses,
    })  # fmt: skip


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _by_path(watched):
    return {check.path: check for check in watched.checks}


def test_a_step_comes_out_as_if_never_watched(training):
    """Several steps are bit-equal, including dropout and random state, and no hook is left."""
    runs = [training(), training()]
    before = _traces(runs[0].model)
    for run in runs:
        torch.manual_seed(5)
        watched = kernels_check.watch(run.model, REQUIRED)
        for _ in range(3):
            if run is runs[0]:
                run.step()
            else:
                with watched:
                    run.step()
    assert _same(_state(runs[0])["losses"], _state(runs[1])["losses"])
    assert _same(_state(runs[0]), _state(runs[1]))
    assert _traces(runs[1].model) == before
    assert all(check.met for check in watched.checks if check.required is not None), watched.checks


def test_learning_is_unknown_after_one_step_and_known_after_two(training):
    """After one step the reason says what to do, and nothing else is missing."""
    run = training()
    watched = kernels_check.watch(run.model, {"peft.learning": True})
    assert watched.checks == []
    with watched:
        run.step()
    first = _by_path(watched)["peft.learning"]
    assert (first.status, first.observed) == ("unknown", None)
    assert "the same watch around the next step" in first.reason
    with watched:
        run.step()
    assert _by_path(watched)["peft.learning"].met
    verified = {check.path: (check.status, check.observed) for check in run.verify({"peft.learning": True})}
    assert {path: (check.status, check.observed) for path, check in _by_path(watched).items()} == verified


def test_an_error_of_the_step_is_raised_and_hooks_are_removed(training):
    """All hooks are removed, nothing passes, and the next step is watched like a first one."""
    run = training()
    before = _traces(run.model)
    watched = kernels_check.watch(run.model, REQUIRED)

    def fail(*_):
        raise KeyError("the step's own")

    broken = run.model.base_model.model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyError, match="the step's own"), watched:
        run.step()
    broken.remove()
    assert {check.status for check in watched.checks} == {"unknown"}
    assert all("the step raised KeyError" in check.reason for check in watched.checks)
    assert [check.path for check in watched.checks] == [path for path, judged in PATHS.items() if not judged.on_request]
    assert _traces(run.model) == before
    with watched:
        run.step()
    assert all(check.met for check in watched.checks if check.required is not None)


def _do_nothing(*_):
    pass


def test_a_model_is_copied_and_saved_while_it_is_watched(training):
    """Copies, as for a checkpoint or a weight average, carry no hooks of the watch, and keep those of the user."""
    run = training(quant=None)
    before = _traces(run.model)
    with kernels_check.watch(run.model, REQUIRED) as watched:
        own = run.model.register_forward_hook(_do_nothing)
        average = copy.deepcopy(run.model)
        own.remove()
        run.step()
        torch.save(run.model, file := io.BytesIO())
    file.seek(0)
    assert _traces(torch.load(file, weights_only=False)) == before
    assert [*map(len, (average._forward_hooks, average._forward_pre_hooks))] == [1, 0]
    assert _traces(average)[:2] == (before[0] + 1, before[1])
    assert all(check.met for check in watched.checks if check.required is not None), watched.checks
    assert _traces(run.model) == before
    torch.save(copy.deepcopy(average), io.BytesIO())
    with kernels_check.watch(run.model, REQUIRED) as watched:
        average(**run.inputs, labels=run.inputs["input_ids"]).loss.backward()
    assert {check.status for check in watched.checks} == {"unknown"}
    assert "the model was not called" in watched.checks[0].reason


def test_bad_requirements_are_refused_at_once(training):
    """The error comes before any hook; a watch cannot be opened twice."""
    run = training()
    with pytest.raises(ValueError, match=r"attention\.speed"):
        kernels_check.watch(run.model, {"attention.speed": "fast"})
    watched = kernels_check.watch(run.model)
    with watched, pytest.raises(RuntimeError, match="open already"):
        watched.__enter__()


def test_a_block_in_which_nothing_ran_shows_nothing(training):
    """A block without a step proves nothing about an adapter."""
    run = training()
    with kernels_check.watch(run.model, REQUIRED) as watched:
        torch.ones(2).sum()
    assert {check.status for check in watched.checks} == {"unknown"}
    assert "the model was not called" in watched.checks[0].reason


def test_a_half_watched_accumulation_is_unknown(training):
    """The block must contain all passes that one update accumulates."""
    run = training()
    run.accumulated = [dict(run.inputs), dict(run.inputs)]
    required = {"optimizer.class": "torch.optim.AdamW", "attention.backend": "flash", "peft.attached": True}
    watched = kernels_check.watch(run.model, required)
    with watched:
        run.model(**run.inputs, labels=run.inputs["input_ids"]).loss.backward()
    half = _by_path(watched)
    assert half["optimizer.class"].status == half["peft.learning"].status == "unknown"
    assert "all that one update accumulates" in half["optimizer.class"].reason
    assert half["attention.backend"].met
    with watched:
        run.step()
    assert all(check.met for check in watched.checks if check.required is not None), watched.checks


def _recorder():
    return profile(activities=[ProfilerActivity.CPU])


def _names(recorded):
    return {event.name for event in recorded.events()}


@pytest.mark.parametrize("outlasts", [False, True])
def test_a_profiler_started_in_the_watch_keeps_its_events(training, outlasts):
    """Paths that need the watch's own profile are unknown, wherever the other profiler ends; paths that need hooks are
    known."""
    run = training()
    before = _traces(run.model)
    profiler = _recorder()
    with kernels_check.watch(run.model, REQUIRED) as watched:
        profiler.start()
        run.step()
        if not outlasts:
            profiler.stop()
    assert is_recording() is outlasts
    torch.ones(4).cumsum(0)
    if outlasts:
        profiler.stop()
    assert "aten::mm" in _names(profiler)
    assert ("aten::cumsum" in _names(profiler)) is outlasts
    checks = _by_path(watched)
    assert checks["attention.backend"].status == "unknown"
    assert "runs a profiler of its own" in checks["attention.backend"].reason
    assert checks["peft.attached"].met
    assert checks["base.frozen"].met
    assert _traces(run.model) == before


def test_a_profiler_around_that_ends_in_the_watch_is_no_error(training):
    """A profiler schedule of the program may end in the step; paths that need the profile are unknown."""
    run = training()
    own = _recorder()
    own.start()
    with kernels_check.watch(run.model, REQUIRED) as watched:
        run.step()
        own.stop()
    assert "aten::mm" in _names(own)
    checks = _by_path(watched)
    assert "the program already runs a profiler" in checks["attention.backend"].reason
    assert checks["attention.backend"].status == "unknown"
    assert checks["peft.attached"].met


@pytest.mark.parametrize("place", ["whole", "layers"])
def test_compiled_code_is_compiled_as_if_never_watched(place):
    """Compiled code contains no hook and no graph break or recompilation for one; the first step is unknown, the second
    is judged."""

    def made():
        forget_compilations()
        run = build(quant=None)
        if place == "whole":
            run.model = torch.compile(run.model, backend="eager")
        else:
            for layer in run.model.base_model.model.model.layers:
                layer.compile(backend="eager")
        torch.manual_seed(3)
        return run

    plain = made()
    for _ in range(2):
        plain.step()
    record = read_compilations()
    run = made()
    watched = kernels_check.watch(run.model, {"compile": True, "peft.attached": True})
    try:
        with watched:
            run.step()
        assert {_by_path(watched)[path].status for path in ("compile", "peft.attached")} == {"unknown"}
        assert "watch a later step" in _by_path(watched)["compile"].reason
        with watched:
            run.step()
        assert _by_path(watched)["compile"].met, watched.checks
        assert run.losses == plain.losses
        assert read_compilations() == record
    finally:
        forget_compilations()


def test_a_failing_hook_is_not_an_error_of_the_step(training, monkeypatch):
    """All checks are unknown, and the reason names the exception."""

    def broken(self, *_, **__):
        raise OSError("no more of it")

    monkeypatch.setattr(calls.CallRecorder, "_enter", broken)
    plain, run = training(), training()
    torch.manual_seed(5)
    plain.step()
    torch.manual_seed(5)
    with kernels_check.watch(run.model, REQUIRED) as watched:
        run.step()
    assert run.losses == plain.losses
    assert {check.status for check in watched.checks} == {"unknown"}
    assert "a hook failed: OSError: no more of it" in watched.checks[0].reason


def test_a_watched_model_can_be_freed(training):
    """A finished watch keeps neither the step's tensors nor the model alive."""
    run = training()
    inputs = {"input_ids": run.inputs["input_ids"].clone(), "use_cache": False}
    gone = []
    run.model.register_forward_hook(lambda module, args, output: gone.append(weakref.ref(output.logits)))
    run.inputs = inputs
    watched = kernels_check.watch(run.model)
    with watched:
        run.step()
    gc.collect()
    assert gone[0]() is None
    model = weakref.ref(run.model)
    del run
    gc.collect()
    assert model() is None
    assert watched.checks


def test_updates_watched_alone_count_for_the_next_watched_step(training):
    """The verdicts are those of two watched steps, the training is bit-equal, and no hook is left."""
    runs = [training() for _ in range(3)]
    before = _traces(runs[0].model)
    watched = [kernels_check.watch(run.model, {**REQUIRED, "peft.learning": True})
               for run in runs[:2]]  # fmt: skip
    for run, first in zip(runs, (watched[0].updates_only(), watched[1], ExitStack()), strict=True):
        torch.manual_seed(5)
        with first:
            run.step()
    assert not watched[0].checks
    assert _by_path(watched[1])["peft.learning"].status == "unknown"
    for run, then in zip(runs, (*watched, ExitStack()), strict=True):
        torch.manual_seed(6)
        with then:
            run.step()
    assert [(one.path, one.status, one.observed) for one in watched[0].checks] == [
        (one.path, one.status, one.observed) for one in watched[1].checks
    ]
    assert _by_path(watched[0])["peft.learning"].status == "active"
    assert _traces(runs[0].model) == before
    assert _same(_state(runs[0]), _state(runs[2]))


REQUIRED_OF_TRAINER = {
    **{"attention.backend": "flash", "attention.mask": "causal", "base.frozen": True, "peft.attached": True},
    **{"peft.learning": True, "optimizer.class": "torch.optim.AdamW", "checkpointing": True, "mode": "train"},
}
ROWS = [{"input_ids": row, "labels": row.clone()} for row in torch.randint(3, 96, (12, 16))]


def _adapted():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0))
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)


class WatchCallback(TrainerCallback):
    """Watches each step from its first micro-batch to its update."""

    def __init__(self, model):
        self.watched = None if model is None else kernels_check.watch(model, REQUIRED_OF_TRAINER)
        self.open = ExitStack()
        self.found = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.open.enter_context(self.watched)

    def on_step_end(self, args, state, control, **kwargs):
        self.open.close()
        self.found.append({check.path: check for check in self.watched.checks})


def _trainer(tmp_path, model, callbacks, **options):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        seed=7,
    )
    return Trainer(model=model, args=arguments, train_dataset=ROWS, callbacks=callbacks, **options)


def _hooks(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def _losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_trainer_trains_as_if_never_watched_and_its_steps_are_judged(tmp_path):
    """Losses and weights are bit-equal; from the second step on every requirement is met, before that all but
    learning."""
    plain, model = _adapted(), _adapted()
    unwatched = _trainer(tmp_path, plain, [])
    unwatched.train()
    callback = WatchCallback(model)
    trainer = _trainer(tmp_path, model, [callback])
    trainer.train()
    assert _losses(trainer) == _losses(unwatched)
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
    assert len(callback.found) == 3
    unmet = [{path for path in REQUIRED_OF_TRAINER if not found[path].met} for found in callback.found]
    assert unmet == [{"peft.learning"}, set(), set()], [found["peft.learning"].reason for found in callback.found]
    assert _hooks(model) == _hooks(plain)


@pytest.mark.filterwarnings("ignore")
def test_the_default_loss_of_trl_is_decided(tmp_path):
    """TRL's trainer computes the loss from log-probabilities of the model, and packs rows without a mask."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="</s>"
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2))
    look = WatchCallback(None)

    def begin(args, state, control, model, **kwargs):
        look.watched = kernels_check.watch(model, {"loss.tokens": True, "packing.isolated": True})

    look.on_train_begin = begin
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "report_to": []}
    rows = [{"input_ids": torch.randint(3, 96, (length,)).tolist()} for length in (5, 9, 14, 7, 11, 6, 13, 8) * 4]
    trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, packing=True, max_length=48, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        callbacks=[look],
    ).train()
    checks = look.found[-1]
    assert [checks[path].status for path in ("loss.tokens", "packing.isolated")] == ["active", "active"], checks
