"""Tensors of every kind are copied and written back in place, or refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kernels_check import verify


@pytest.fixture
def alone(tmp_path):
    """A process group of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/meeting")
    yield
    dist.destroy_process_group()


def _losses(run, watched, instrument):
    """Two steps, a watched one in between where asked, and three more."""
    torch.manual_seed(1)
    model, optimizer = run()
    data = torch.randn(5, 4, 8)

    def step(place=0):
        optimizer.zero_grad()
        loss = model(data[place]).pow(2).mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    first = [step(place) for place in range(2)]
    if watched:
        verify(model, step, {}, instrument=instrument)
    return [*first, *(step(place) for place in range(2, 5))]


@pytest.mark.parametrize("instrument", ["spy", "profile"])
def test_sharded_training_goes_on_as_if_never_watched(alone, instrument):
    """FSDP2's parameters, gradients and state are DTensors, in a run that has not stepped and in one that has."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def run():
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 2))
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    assert _losses(run, True, instrument) == _losses(run, False, instrument)


def test_replicated_training_goes_on_as_if_never_watched(alone):
    """A model under DistributedDataParallel, whose reducer keeps state of its own."""

    def run():
        model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
        return model, torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    assert _losses(run, True, "spy") == _losses(run, False, "spy")


def test_weights_and_states_of_torchao_go_on_as_if_never_watched():
    """Quantised weights beside trained ones, and an optimizer whose state is 8-bit tensors of its own class."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    optim = pytest.importorskip("torchao.optim")

    def run():
        model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 2))
        model[1].requires_grad_(False)
        quantization.quantize_(model[1], quantization.Int8WeightOnlyConfig())
        trained = [value for value in model.parameters() if value.requires_grad]
        return model, optim.AdamW8bit(trained, lr=1e-2, block_size=64)

    assert _losses(run, True, "spy") == _losses(run, False, "spy")
