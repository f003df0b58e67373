"""What comes back after a watched step, what cannot, and who is told."""

import threading

import bitsandbytes as bnb
import pytest
import torch
from negative_controls.random_run import check_restored
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.swa_utils import AveragedModel

from kernels_check import verify
from kernels_check.observation import snapshot as snapshot_module
from kernels_check.observation.restore import as_found
from kernels_check.observation.snapshot import RestoreError

SEEDS, BLOCK = 200, 25


class Stubborn(list):
    """A list that does not let itself be emptied."""

    def clear(self):
        raise OSError("not mine to empty")


@pytest.fixture
def trained():
    """A model, its optimizer, and one step of them."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        model(torch.randn(3, 4)).pow(2).sum().backward()
        optimizer.step()

    return model, optimizer, step


def _values(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _equal(model, values):
    now = model.state_dict()
    return now.keys() == values.keys() and all(torch.equal(now[name], value) for name, value in values.items())


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_runs_drawn_at_random_equal_their_twins(first):
    """After a spied step, state and the next three losses are those of a run that was never watched."""
    assert not [told for seed in range(first, first + BLOCK) if (told := check_restored(seed))]


def test_runs_drawn_at_random_equal_their_twins_under_the_profiler():
    """The profiler leaves a run as it was as well."""
    assert not [told for seed in range(SEEDS, SEEDS + 12) if (told := check_restored(seed, "profile"))]


def test_all_the_rest_is_restored_when_one_thing_cannot_be(trained):
    """One fault stops nothing: parameters, state, modes and numbers come back, and the fault is named."""
    model, optimizer, step = trained
    model.kept = Stubborn([1])
    before, draws = _values(model), torch.get_rng_state()

    def change():
        step()
        model.eval()
        model.kept.append(2)
        model.later = model.kept

    with pytest.raises(RestoreError, match=r"model\.kept \(OSError: not mine to empty\)") as raised:
        verify(model, change, {}, instrument="spy")
    assert len(raised.value.faults) == 1
    assert _equal(model, before)
    assert model.training
    assert not optimizer.state
    assert not hasattr(model, "later")
    assert torch.equal(torch.get_rng_state(), draws)
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


def test_what_the_step_raised_is_seen_first(trained):
    """The step's own exception arrives, with what could not be restored as a note."""
    model, _, step = trained
    model.kept = Stubborn()

    def change():
        step()
        model.kept.append(2)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as raised:
        verify(model, change, {}, instrument="spy")
    assert "model.kept" in raised.value.__notes__[0]


def test_an_interrupt_is_no_reason_to_stop_restoring(trained, monkeypatch):
    """What was interrupted is done again, the rest follows, and the interrupt arrives at the end."""
    model, _, step = trained
    before, draws = _values(model), torch.get_rng_state()
    synchronise, calls = snapshot_module.synchronise, []

    def interrupted():
        calls.append(1)
        if len(calls) == 3:  # once when the snapshot is made, once before the update
            raise KeyboardInterrupt
        synchronise()

    monkeypatch.setattr(snapshot_module, "synchronise", interrupted)
    with pytest.raises(KeyboardInterrupt), as_found(model, step):
        step()
    assert _equal(model, before)
    assert torch.equal(torch.get_rng_state(), draws)


@pytest.mark.parametrize("broken", ["freed", "lazy"])
def test_what_cannot_be_copied_is_refused_before_the_first_step(broken):
    """The error names the parameter, and the step has not been called."""
    model, calls = nn.Sequential(nn.Linear(4, 4)), []
    if broken == "freed":
        model[0].weight.untyped_storage().resize_(0)
    else:
        model[0] = nn.LazyLinear(4)
    with pytest.raises(ValueError, match=r"0\.weight .* cannot be copied"):
        verify(model, lambda: calls.append(1), {})
    assert not calls


@pytest.mark.parametrize("instrument", ["spy", "profile"])
def test_sparse_gradients_come_back(instrument):
    """A sparse gradient is judged, and one that was there before keeps identity and value."""
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True))
    optimizer = torch.optim.SparseAdam(model.parameters())
    words = torch.tensor([1, 2, 2])
    model(words).sum().backward()
    gradient, before = model[0].weight.grad, model[0].weight.grad.to_dense()

    def step():
        model(words).pow(2).sum().backward()
        optimizer.step()

    verify(model, step, {}, instrument=instrument)
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient.to_dense(), before)


def test_layers_that_share_an_adapter_keep_no_hook(training):
    """One lora_A in two layers is watched once, under both names, and let go."""
    run = training()
    first, second = (module for name, module in run.model.named_modules() if name.endswith("q_proj"))
    second.lora_A["default"] = first.lora_A["default"]
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad])
    assert run.check("lora.attached").observed is True
    assert not any(module._forward_pre_hooks for module in run.model.modules())


def test_memory_that_the_step_freed_or_swapped_is_there_again(trained):
    """Values lie where they lay, also where the step pointed elsewhere or gave memory back."""
    model, _, step = trained
    before = _values(model)
    addresses = [value.data_ptr() for value in model.parameters()]

    def change():
        step()
        model.half()
        model[1].running_mean.data = torch.zeros(2)
        model[1].running_var.untyped_storage().resize_(0)

    with as_found(model, change):
        change()
    assert _equal(model, before)
    assert [value.data_ptr() for value in model.parameters()] == addresses


def test_hooks_that_the_step_sets_are_gone(trained):
    """On modules, on parameters and on their accumulated gradients."""
    model, _, step = trained

    def change():
        step()
        model.register_forward_hook(lambda *_: None)
        model[0].weight.register_hook(lambda gradient: gradient * 2)
        model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)

    with as_found(model, change):
        change()
    assert not model._forward_hooks
    assert not model[0].weight._backward_hooks
    assert not model[0].weight._post_accumulate_grad_hooks


def test_expanded_buffers_come_back():
    """A buffer whose elements share memory is written through the memory."""
    model = nn.Linear(2, 2)
    model.register_buffer("row", torch.ones(1, 3).expand(4, 3))
    with as_found(model):
        model.row.data[0].add_(1)
    assert torch.equal(model.row, torch.ones(4, 3))


def test_scaler_scheduler_and_average_come_back_when_the_step_holds_them(trained):
    """All three are reached through the step."""
    model, optimizer, _ = trained
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    average = AveragedModel(model)
    before = _values(average)

    def change():
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(3, 4)).pow(2).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        average.update_parameters(model)

    verify(model, change, {}, instrument="spy")
    assert scaler.state_dict()["scale"] == 8.0
    assert schedule.last_epoch == 0
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert _equal(average, before)


def test_a_frozen_copy_too_large_to_be_kept_is_told(trained, monkeypatch):
    """What is neither copied nor left alone is an error that names it, not a silence."""
    model, _, step = trained
    other = nn.Linear(4, 4).requires_grad_(False)
    monkeypatch.setattr(snapshot_module, "COPIED_BYTES", 8)

    def change():
        step()
        other.weight.add_(1)

    verify(model, lambda: (other, step()), {}, instrument="spy")
    with pytest.raises(RestoreError, match=r"other\.weight .*changed it in place"):
        verify(model, change, {}, instrument="spy")


def test_a_second_model_is_copied_when_its_optimizer_announces_it(trained, monkeypatch):
    """A large second model that an optimizer updates needs no copy before that."""
    model, _, step = trained
    other = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    before = _values(other)
    monkeypatch.setattr(snapshot_module, "COPIED_BYTES", 0)

    def change():
        step()
        other(torch.ones(1, 4)).sum().backward()
        optimizer.step()

    verify(model, change, {}, instrument="spy")
    assert _equal(other, before)
    assert other.weight.grad is None


class Holder:
    """Something a step can use and nobody can look into."""

    def __init__(self, *held):
        self.held = held
        self.lock = threading.Lock()


def test_data_iterators_stay_where_the_step_left_them(trained):
    """Control: nothing announces what was read."""
    model, _, step = trained
    batches = iter(range(9))
    verify(model, lambda: (step(), next(batches)), {}, instrument="spy")
    assert next(batches) > 0


def test_what_a_trainer_counts_stays_counted(trained):
    """Control: objects of the step's own are the step's."""
    model, _, step = trained
    counts = {"steps": 0}

    def change():
        step()
        counts["steps"] += 1

    verify(model, change, {}, instrument="spy")
    assert counts["steps"] > 0


def test_what_cannot_be_reached_from_the_step_stays_changed(trained):
    """Control: an average behind a door without a handle."""
    model, _, step = trained
    average = AveragedModel(model)
    behind = {}.get
    table = {"average": average}
    behind = table.get  # a method of a builtin says nothing of what it holds

    def change():
        step()
        behind("average").update_parameters(model)

    verify(model, change, {}, instrument="spy")
    assert int(average.n_averaged) > 0


def test_gradients_of_a_model_that_cannot_be_reached_are_left(trained):
    """Control: its parameters come back, since its optimizer announces them; what its gradients were is not known."""
    model, _, step = trained
    other = nn.Linear(4, 4)
    table = {"model": other, "optimizer": torch.optim.SGD(other.parameters(), lr=1.0)}
    before, behind = _values(other), table.get

    def change():
        step()
        behind("model")(torch.ones(1, 4)).sum().backward()
        behind("optimizer").step()

    verify(model, change, {}, instrument="spy")
    assert _equal(other, before)
    assert other.weight.grad is not None


def test_a_frozen_parameter_changed_in_place_is_reported_and_not_restored(trained):
    """Control: the base is too large to be copied, and ``base.frozen`` says that it changed."""
    model, _, step = trained
    model[0].weight.requires_grad_(False)

    def change():
        step()
        model[0].weight.add_(1)

    before = model[0].weight.clone()
    checks = {check.path: check for check in verify(model, change, {}, instrument="spy")}
    assert checks["base.frozen"].observed is False
    assert not torch.equal(model[0].weight, before)


def test_an_object_that_cannot_be_copied_whole_is_left(trained):
    """Control: a counter beside a lock stays counted; one without comes back."""
    model, _, step = trained
    model.open, model.closed = Holder(), Holder()
    model.open.count = model.closed.count = 0
    del model.closed.lock

    def change():
        step()
        model.open.count += 1
        model.closed.count += 1

    verify(model, change, {}, instrument="spy")
    assert model.open.count > 0
    assert model.closed.count == 0


def test_switches_of_the_process_stay_as_the_step_set_them(trained):
    """Control: how cuDNN chooses is the process's, not the model's."""
    model, _, step = trained
    before = torch.backends.cudnn.benchmark

    def switching():
        step()
        torch.backends.cudnn.benchmark = not before

    try:
        verify(model, switching, {}, instrument="spy")
        assert torch.backends.cudnn.benchmark is not before
    finally:
        torch.backends.cudnn.benchmark = before


def test_weights_packed_by_an_evaluation_step_are_unpacked_again(training):
    """bitsandbytes repacks 4-bit weights in place in evaluation, after which no gradient passes through them."""
    run = training()
    layer = next(module for name, module in run.model.named_modules() if name.endswith("q_proj.base_layer"))
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this processor has no AVX512_BF16, so nothing is packed")
    before = layer.weight.data.clone()

    def evaluate():
        run.model.eval()
        with torch.no_grad():
            run.model(**run.inputs)

    run.verify({}, evaluate)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(layer.weight.data, before)
    run.step()


def test_the_digest_leaves_memory_that_can_be_resized(trained):
    """Some trainers free and allocate the memory of weights themselves."""
    model, _, step = trained
    verify(model, step, {}, instrument="spy")
    model[0].weight.untyped_storage().resize_(128)


def test_eight_bit_scales_that_move_in_the_first_forward_move_back(training):
    """LLM.int8 before its first step: its scales lie on the weight again, and nothing of the base has changed."""

    def to_int8(linear):
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")

    run, twin = training(quant=to_int8), training(quant=to_int8)
    layer = next(module for name, module in run.model.named_modules() if name.endswith("q_proj.base_layer"))
    scales = layer.weight.SCB
    assert run.check("base.frozen", True).met
    assert layer.weight.SCB is scales
    assert layer.state.SCB is None
    run.losses.clear()
    for _ in range(2):
        torch.manual_seed(2)
        run.step()
        torch.manual_seed(2)
        twin.step()
    assert run.losses == twin.losses
