"""Tests of the frozen base: no step may change it; changes that only look like training are named and are not a
fault.

Tests that the tensors of the base prove its storage, its precision and that it is frozen.

Tests that the bits of a base follow from its bytes, in the formats of several libraries.
"""

import peft
import pytest
import torch
import torch.distributed as dist
from negative_controls.small_run import SmallRun
from torch import nn

from kernels_check import verify
from kernels_check.observe.adapter import adapter_layers
from lorameter.studies.quantization import BUILT_IN


def _tuned(base, *, optimizer=torch.optim.AdamW, everything=False, **options):
    """Return a model with an adapter on its first layer, and its optimizer."""
    torch.manual_seed(3)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, **{"target_modules": ["0"], **options})).train()
    given = [value for value in model.parameters() if everything or value.requires_grad]
    return model, optimizer(given, lr=1e-2)


def _judged(model, optimizer, *, inputs=None, also=lambda: None, path="base.frozen", required=True):
    inputs = torch.randn(4, 8) if inputs is None else inputs

    def step():
        optimizer.zero_grad()
        found = model(inputs)
        (found[0] if isinstance(found, tuple) else found).pow(2).mean().backward()
        optimizer.step()
        also()

    return next(check for check in verify(model, step, {path: required}) if check.path == path)


def _with_spare(**options):
    """Return a base with a layer that no forward calls."""
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    base.spare = nn.Linear(8, 8, **options)
    base.forward = lambda inputs: base[1](base[0](inputs))
    return base


def _norm():
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def _frozen_norm():
    """Return a base whose norm statistics do not change."""
    base = _norm()
    base[1].track_running_stats, base[1].running_mean, base[1].running_var = False, None, None
    return base


class Remembers(nn.Module):
    """A module that stores a value of its last input in a buffer."""

    def __init__(self, *, saved):
        super().__init__()
        self.register_buffer("last", torch.zeros(8), persistent=saved)

    def forward(self, hidden):
        """Return the input."""
        self.last = hidden.detach().mean(0)
        return hidden


def test_a_buffer_that_is_not_saved_is_not_part_of_the_base():
    """A non-persistent buffer that the forward recomputes, such as rotary positions, does not count; a persistent one
    does."""
    recomputed = _judged(*_tuned(nn.Sequential(nn.Linear(8, 8), Remembers(saved=False))))
    assert recomputed.met
    assert "which are not saved with the model: base_model.model.1.last" in recomputed.reason
    assert not _judged(*_tuned(nn.Sequential(nn.Linear(8, 8), Remembers(saved=True)))).met


def test_parameters_that_would_train_with_a_gradient_are_not_frozen():
    """An unused trainable parameter, such as an idle expert, is frozen only if no optimizer holds it."""
    model, optimizer = _tuned(_with_spare())
    model.base_model.model.spare.requires_grad_(True)
    idle = _judged(model, optimizer)
    assert idle.met
    assert "though they require gradients: base_model.model.spare.weight" in idle.reason
    optimizer.add_param_group({"params": list(model.base_model.model.spare.parameters())})
    waiting = _judged(model, optimizer)
    assert waiting.status == "fallback"
    assert "2 base parameters require gradients" in waiting.reason


def test_trainable_parameters_are_unknown_without_an_optimizer():
    """An accumulation step updates nothing, so that the check is unknown."""
    model, _ = _tuned(_with_spare())
    model.base_model.model.spare.requires_grad_(True)
    inputs = torch.randn(4, 8)
    checks = verify(model, lambda: model(inputs).sum().backward(), {"base.frozen": True})
    check = next(check for check in checks if check.path == "base.frozen")
    assert check.status == "unknown", check.reason
    assert "no optimizer stepped" in check.reason
    assert "spare.weight" in check.reason


def test_biases_that_peft_was_asked_to_train_are_the_adapters():
    """The rest of the base is frozen, and the reason names the trained biases."""
    check = _judged(*_tuned(_frozen_norm(), bias="all"))
    assert check.met, check.reason
    assert "3 biases train with the adapter, as PEFT is configured by bias='all'" in check.reason


class Attends(nn.Module):
    """An attention module whose query, key and value projections are not layers."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, hidden):
        """Apply the attention and the head."""
        return self.head(self.attention(hidden, hidden, hidden)[0])


def test_an_adapter_merged_for_each_forward_leaves_rounding():
    """PEFT adapts ``nn.MultiheadAttention`` only by merging in each forward; a change beyond rounding is training."""
    inputs, dtype = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.bfloat16
    model, optimizer = _tuned(Attends().to(dtype), target_modules=["attention"])
    check = _judged(model, optimizer, inputs=inputs)
    assert check.met, check.reason
    assert "except rounding, because PEFT merges" in check.reason
    model, optimizer = _tuned(Attends().to(dtype), target_modules=["attention"])

    def drift():
        model.base_model.model.attention.base_layer.in_proj_weight.data += 1e-2

    assert _judged(model, optimizer, inputs=inputs, also=drift).status == "fallback"
    assert _judged(model, optimizer, inputs=inputs, path="base.bits", required=16).observed == 16


def test_parameters_on_the_meta_device_are_unknown():
    """Parameters on the meta device, such as layers offloaded to disk, cannot be compared."""
    check = _judged(*_tuned(_with_spare(device="meta")))
    assert check.status == "unknown"
    assert "the bytes of 2 parts could not be read: base_model.model.spare.weight" in check.reason


@pytest.fixture
def alone(tmp_path):
    """A process group of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/meeting")
    yield
    dist.destroy_process_group()


def _shard(run: SmallRun) -> None:
    in_4_bits = any(parameter.dtype == torch.uint8 for parameter in run.model.parameters())
    if in_4_bits and not BUILT_IN["nf4"].is_sharded_by(torch.__version__):
        pytest.skip(f"FSDP2 shards 4-bit weights from torch {BUILT_IN['nf4'].fsdp2_since} on")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in run.model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(run.model, mesh=mesh)
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-3)


def test_a_sharded_base_is_read_and_compared(training, alone):
    """The check compares the local shards of FSDP2; the state of a 4-bit weight is then with its layer."""
    run = training()
    _shard(run)
    run.step()
    checks = {check.path: check for check in run.verify({"base.bits": 4, "base.frozen": True})}
    assert checks["base.bits"].met, checks["base.bits"].reason
    assert checks["base.frozen"].met, checks["base.frozen"].reason

    def step():
        run.step()
        run.model.base_model.model.lm_head.weight.data._local_tensor[5, 3] += 1

    moved = run.check("base.frozen", True, step)
    assert moved.status == "fallback"
    assert "lm_head.weight._local_tensor" in moved.reason


def test_sharded_weights_of_which_only_the_state_was_repacked_are_found(training, alone):
    """FSDP2 gathers the old layout for each forward, but bitsandbytes has marked the state as repacked in place.

    From the second forward on the losses are wrong.
    """
    runs = [training(dtype="float32", compute="float32", lora_dropout=0.0) for _ in range(2)]
    if not adapter_layers(runs[0].model)[0].base.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512_BF16, so bitsandbytes does not repack")
    _shard(runs[1])
    for run in runs:
        run.model.eval()
        run.optimizer.param_groups[0]["lr"] = 0.0
        run.step()
        run.step()
    assert runs[0].losses[0] == pytest.approx(runs[1].losses[0], rel=1e-3)
    assert runs[0].losses[1] != pytest.approx(runs[1].losses[1], rel=1e-5)
    checks = {check.path: check for check in runs[1].verify({"base.bits": 4, "base.frozen": True})}
    assert checks["base.frozen"].status == "fallback"
    assert "do not fit their states" in checks["base.frozen"].reason
    assert "support_avx512bf16_for_cpu=False" in checks["base.frozen"].reason
    assert checks["base.bits"].status == "unknown"
    assert "repacked for AVX512, but the weight was not" in checks["base.bits"].reason


@pytest.mark.parametrize(
    ("spoil", "status", "words"),
    [
        (lambda model, optimizer: None, "active", "gradients reached all 4 parameters of the base"),
        (lambda model, optimizer: model[0].requires_grad_(False), "fallback", "2 base parameters require no gradient"),
        (lambda model, optimizer: optimizer.param_groups[0].update(lr=0.0), "fallback", "no byte of the base changed"),
        (lambda model, optimizer: optimizer.param_groups[0]["params"].pop(), "fallback", "not given to the optimizer"),
    ],
    ids=["healthy", "a layer is frozen", "learning rate 0", "a parameter is left out"],
)
def test_full_fine_tuning_moves_the_base(spoil, status, words):
    """Every parameter requires a gradient, gets one and is held by the optimizer, and an update changes some."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spoil(model, optimizer)
    check = _judged(model, optimizer, path="base.learning")
    assert check.status == status, check.reason
    assert words in check.reason


def _bases(run):
    return [layer.base for layer in adapter_layers(run.model)]


def test_an_unset_compute_dtype_is_read_after_the_first_forward(training):
    """bitsandbytes sets an unset compute dtype from its first input."""
    assert training(compute=None, dtype="bfloat16").check("base.compute_dtype", "bfloat16").met


def test_a_bias_cast_by_the_forward_is_not_training(training):
    """bitsandbytes casts a float32 bias to the compute dtype in the first forward; the reason says so."""
    run = training()
    base = _bases(run)[0]
    base.bias = torch.nn.Parameter(torch.full((128,), 0.1), requires_grad=False)
    check = run.check("base.frozen", True)
    assert check.met
    assert "except values that the first forward cast" in check.reason
    assert "q_proj.base_layer.bias" in check.reason


def test_a_step_in_eval_mode_that_repacks_the_base_is_seen(training):
    """A base whose bytes change during the step is not called frozen or double quantised."""
    run = training()
    if not _bases(run)[0].support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512_BF16, so bitsandbytes does not repack")
    run.model.eval()
    check = run.check("base.frozen", True)
    assert check.status == "unknown"
    assert "repacked Linear4bit weights in place" in check.reason
    assert "packed_cpu" in run.check("base.gemm_path", "dequantize").observed
    assert run.check("base.double_quant", True).status != "active"


def test_the_gemm_path_of_a_float_base_is_not_applicable(training):
    """A float base has no 4-bit product."""
    assert training(quant=None).check("base.gemm_path", "dequantize").status == "not_applicable"


class Adapted(nn.Module):
    """An adapter on a base layer of another library, without the base's product."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = base, nn.Linear(64, 2), nn.Linear(2, 32)

    def forward(self, x):
        return self.lora_B(self.lora_A(x))


def packed(name, shape, dtype=torch.int32, **attributes):
    """Return a layer that stores integers in a buffer and describes them in attributes."""
    layer = nn.Module()
    layer.register_buffer(name, torch.zeros(shape, dtype=dtype))
    vars(layer).update(attributes)
    return layer


def plain(dtype):
    """Return a linear layer of a floating point type."""
    return nn.Linear(64, 32, bias=False).to(dtype).requires_grad_(False)


@pytest.mark.parametrize(
    ("base", "bits"),
    [
        (packed("qweight", (64 // 8, 32), bits=4, in_features=64, out_features=32), 4),
        (packed("qweight", (64, 32 // 8), w_bit=4, in_features=64, out_features=32), 4),
        (packed("W_q", (64 * 32 // 2, 1), torch.uint8, meta={"nbits": 4, "shape": (32, 64)}), 4),
        (plain(torch.bfloat16), 16),
        (plain(torch.float8_e4m3fn), 8),
        (packed("qweight", (64 // 8, 32), bits=8, in_features=64, out_features=32), None),
        (packed("qweight", (64 // 8, 32)), None),
    ],
    ids=["GPTQ", "AWQ", "HQQ", "bfloat16", "float8", "a false claim", "no claim"],
)
def test_the_bits_of_a_base_are_those_of_its_bytes(base, bits):
    """An attribute that contradicts the bytes, and integers without an attribute, are unknown."""
    model = nn.Sequential(Adapted(base))
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    check = _judged(model, optimizer, inputs=torch.ones(2, 64), path="base.bits", required=bits or 4)
    assert check.status == ("unknown" if bits is None else "active"), check.reason
    assert check.observed == bits
