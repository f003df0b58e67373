"""The profiler's records become linked operators, without the many that nobody reads."""

from types import SimpleNamespace

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from kernels_check.observation.events import CompilerSeen
from kernels_check.observation.recording import entries, profiled, read_operators


def _record(name, start, end, *, thread=1, end_thread=None, device=DeviceType.CPU, annotation=False):
    values = {
        **{"name": name, "start_ns": start, "end_ns": end, "start_thread_id": thread, "device_type": device},
        **{"end_thread_id": end_thread or thread, "is_async": False, "is_user_annotation": annotation},
        **{"is_hidden_event": False, "shapes": [], "dtypes": [], "concrete_inputs": []},
    }
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def _recorded(*records):
    result = SimpleNamespace(events=lambda: list(records))
    return SimpleNamespace(profiler=SimpleNamespace(kineto_results=result))


def test_the_nearest_kept_caller_is_the_parent():
    """Records in between that nobody reads are skipped; another thread, or a later time, is no caller."""
    operators, _ = read_operators(
        _recorded(
            _record("aten::linear", 20, 30),
            _record("aten::view", 15, 35),
            _record("bitsandbytes::gemm_4bit", 10, 40),
            _record("aten::softmax", 41, 50),
            _record("aten::add", 20, 30, thread=2),
        )
    )
    parents = {operator.name: operator.parent and operator.parent.name for operator in operators}
    assert parents == {
        **{"bitsandbytes::gemm_4bit": None, "aten::linear": "bitsandbytes::gemm_4bit"},
        **{"aten::softmax": None, "aten::add": None},
    }


def test_a_record_inside_its_own_name_is_one_call():
    """The dispatcher records an operator written in Python twice; a second call after it counts."""
    operators, _ = read_operators(
        _recorded(*(_record("bitsandbytes::gemm_4bit", *span) for span in ((0, 10), (1, 9), (11, 12))))
    )
    assert len(operators) == 2


def test_kernels_are_launches_only():
    """Annotations and memory records on the device are no kernels; a record that changes threads is no call."""
    cuda = DeviceType.CUDA
    operators, kernels = read_operators(
        _recorded(
            _record("void pytorch_flash::flash_fwd_kernel<>", 0, 1, device=cuda),
            _record("step", 0, 1, device=cuda, annotation=True),
            _record("[memory]", 0, 1, device=cuda),
            _record("aten::add", 0, 1, end_thread=2),
        )
    )
    assert operators == []
    assert kernels == ["void pytorch_flash::flash_fwd_kernel<>"]


def test_entries_are_those_of_a_profile():
    """Compiled regions and look-ups, however little is recorded; nothing compiled enters none."""
    compiled = torch.compile(torch.nn.ReLU(), backend="eager")
    compiled(torch.ones(2))
    seen = profiled(lambda: compiled(torch.ones(2)))
    assert entries(lambda: compiled(torch.ones(2))) == seen.compiler
    assert (seen.compiler.entered, seen.compiled_regions, seen.compiler_lookups) == ((None,), 1, 1)
    torch._dynamo.reset()
    assert entries(lambda: torch.ones(2) + 1) == CompilerSeen()


def test_a_real_recording_carries_shapes_and_types():
    """What the profiler recorded of a softmax, read back."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        torch.ones(1, 1, 3, 3, dtype=torch.bfloat16).softmax(-1)
    operators, kernels = read_operators(recorded)
    outer = next(operator for operator in operators if operator.name == "aten::softmax")
    assert outer.input_shapes[0] == [1, 1, 3, 3]
    assert outer.input_dtypes[0] == "c10::BFloat16"
    assert [child.name for child in outer.children] == ["aten::_softmax"]
    assert kernels == []
