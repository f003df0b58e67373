"""What looks on stays where it was put: neither copies nor files of a module carry it on."""

import copy
import io
import pickle

import torch
from torch import nn

from kernels_check.observation import compilations
from kernels_check.observation.calls import CallRecorder
from kernels_check.observation.shield import ModuleHook, Shield
from kernels_check.observation.watcher import StepWatcher


class Layer(nn.Module):
    """A layer of an adapter of one's own."""

    def __init__(self):
        super().__init__()
        self.base_layer, self.lora_A = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.base_layer(x) + self.lora_A(x)


def _copies(model):
    """A deep one, one from a file, a copy of a copy, and a shallow one of a part."""
    file = io.BytesIO()
    torch.save(model, file)
    assert b"kernels_check" not in file.getvalue().replace(Layer.__module__.encode(), b"")
    file.seek(0)
    deep = copy.deepcopy(model)
    return [deep, torch.load(file, weights_only=False), copy.deepcopy(deep), copy.copy(model[0].lora_A)]


def test_calls_of_copies_are_no_calls_of_the_model():
    """Made while it is watched, and called then or later; of the model itself nothing is missed."""
    model = nn.Sequential(Layer())
    watcher = StepWatcher(model, shield=Shield())
    with watcher.hooked() as recorder:
        copies = _copies(model)
        for one in copies:
            one(torch.ones(1, 4))
        assert (recorder.log, watcher.adapter.layers, watcher.inputs.calls) == ([], {}, [])
        model(torch.ones(1, 4))
    for one in copies:
        one(torch.ones(1, 4))
        pickle.dumps(one)
    assert [call.name for call in watcher.calls.all] == ["", "0", "0.base_layer", "0.lora_A"]
    assert [list(call.ran) for call in watcher.adapter.layers["0"]] == [["0.lora_A"]]
    assert len(watcher.inputs.calls) == 1
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_a_copy_is_compiled_whole():
    """Nothing in it breaks the graph."""
    model = nn.Sequential(Layer())
    with CallRecorder(model).hooked():
        made = copy.deepcopy(model)
    try:
        assert torch.compile(made, backend="eager", fullgraph=True)(torch.ones(1, 4)).shape == (1, 4)
    finally:
        compilations.forget()


def test_replicas_of_data_parallel_are_the_model():
    """What torch makes of a module for each device shares its hooks, and trains its parameters."""
    model = nn.Linear(4, 4)
    recorder = CallRecorder(model)
    with recorder.hooked():
        replica = model._replicate_for_data_parallel()
        replica.weight, replica.bias = model.weight, model.bias
        replica(torch.ones(1, 4))
    assert [call.names for call in recorder.calls().all] == [("",)]
    assert recorder.current() is None


def test_a_hook_is_called_for_its_module_alone():
    """With what torch gives it, and what it returns is returned."""
    module, other = nn.Linear(1, 1), nn.Linear(1, 1)
    hook = ModuleHook(module, lambda *given: given)
    assert hook(module, (1,), {}) == (module, (1,), {})
    assert hook(other, (1,), {}) is None
    other._is_replica = True
    assert hook(other, 2) == (other, 2)
    other._is_replica = False
    assert hook(other, 2) is None
    assert copy.deepcopy(hook)(module, (1,), {}) is None
