"""GPU tests of the kernel rules: each rule is compared with the real library.

Every GPU test records its call with torch's profiler, exports the trace and judges that file; most tests also verify
the live step. ``EXPECTED`` lists the rules that each recording must show, and a rule without a recording fails on any
machine. Missing hardware or packages skip a test with the library's own message.
"""

from __future__ import annotations

import ctypes
import importlib
import warnings
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from negative_controls import execution_faults, faults
from packaging.version import Version
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import kernels_check
from kernels_check.observe.profile import quiet_kineto
from kernels_check.rules import attention_backend, classify, classify_operator, load_rules
from kernels_check.trace.recording import read_kineto

EXPECTED = {
    "flash": {"ATT-SDPA-FLASH", "OP-ATT-FLASH"},
    "cudnn": {"ATT-CUDNN", "OP-ATT-CUDNN"},
    "efficient": {"ATT-EFFICIENT", "OP-ATT-EFFICIENT"},
    "math": {"ATT-SOFTMAX", "OP-ATT-MATH"},
    "flash on ROCm": {"ATT-TRITON", "OP-ATT-FLASH"},
    "flash_attention_2": {"ATT-FA2", "OP-ATT-FA2"},
    "flash_attention_2 before 2.7": {"ATT-FA2-VENDORED"},
    "flash_attention_3": {"ATT-FA3", "OP-ATT-FA3"},
    "flash_attention_4": {"ATT-FA4"},
    "flex": {"ATT-FLEX"},
    "another device's attention": {"OP-ATT-OVERRIDEABLE"},
    "nf4 training": {"BNB-DEQ-NF4", "OP-BNB-GEMM4", "ATT-SOFTMAX-LOG", "MEM", "ATEN"},
    "fp4 training": {"BNB-DEQ-FP4", "OP-BNB-GEMM4"},
    "double quantisation": {"BNB-DEQ-NF4", "BNB-DEQ-8BIT", "OP-BNB-DEQ-8BIT"},
    "nf4 decoding": {"BNB-GEMM4", "OP-BNB-GEMM4"},
    "gemv": {"BNB-GEMV-OLD"},
    "quantise": {"BNB-QUANT"},
    "int8": {"BNB-INT8"},
    "paged optimizer": {"BNB-OPT32", "BNB-FILL"},
    "8-bit optimizer": {"BNB-OPT8"},
    "fused optimizer": {"OPT-TORCH-FUSED", "OP-OPT-TORCH"},
    "foreach optimizer": {"OPT-TORCH-FOREACH", "OP-OPT-TORCH"},
    "tf32 on": {"GEMM-TF32"},
    "tf32 off": {"GEMM-FP32-SIMT"},
    "bfloat16 product": {"GEMM-BF16"},
    "float16 product": {"GEMM-FP16"},
    "matrix times vector": {"GEMM-OTHER"},
    "compiled": {"INDUCTOR"},
    "Liger": {"LIGER"},
    "Unsloth": {"UNSLOTH", "UNSLOTH-DEQ", "UNSLOTH-GEMV"},
    "Triton by hand": {"TRITON-STEP"},
    "convolution": {"CUDNN-LAYER"},
    "collective": {"NCCL"},
}
"""Rules that the recording of each case must show; it may show more."""
ELSEWHERE = {
    **dict.fromkeys(("GEMM-AMD", "CK", "MIOPEN"), "an AMD GPU"),
    **dict.fromkeys(("ATT-TRTLLM", "GEMM-FP4", "GEMM-FP8"), "Blackwell, and products in 4 and 8 bits"),
    **dict.fromkeys(
        (
            "ATT-VLLM",
            "ATT-FLASHINFER",
            "ATT-AITER",
            "GEMM-TRTLLM-FP4",
            "GEMM-TRTLLM-FP8",
            "GEMM-TRTLLM",
            "GEMM-DEEPGEMM-FP8",
            "GEMM-DEEPGEMM",
            "GEMM-WEIGHT-ONLY",
            "GEMM-MOE-TRITON",
            "GEMM-ROCM-SKINNY",
            "CONVOLUTION",
            "CUTE-DSL",
            "COMM-CUSTOM",
            "FBGEMM",
            "SSM",
            "SERVING",
        ),
        "a serving engine, or a GPU that is not available here",
    ),
    **dict.fromkeys(("TRITON-MXFP4", "TRITON-KERNELS"), "gpt-oss with triton_kernels"),
    "TE-APEX": "Transformer Engine, or Apex",
    "ATT-LIGER": "neighborhood attention, which no model of transformers has",
    **dict.fromkeys(
        ("ATT-UNSLOTH", "UNSLOTH-DEQ-OTHER", "UNSLOTH-GEMM"), "weights in fp8 or NVFP4, experts, large heads"
    ),
}
"""Rules that no recording on the available GPUs can show, each with the hardware that it needs; their kernel names come
from sources or from published recordings."""
RUN: set[str] = set()
ALL_RULES = (*load_rules("rules"), *load_rules("operators"))
GPU_RULES = sorted(rule.name for rule in ALL_RULES if rule.gpu_only)
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NO_KERNEL = ("No available kernel", "No viable backend")
"""torch's messages when no allowed backend supports the inputs; the reasons are in preceding warnings."""
TRAINING_TOKENS = (16, 128)
"""2048 rows of a product: above the 1536 from which bitsandbytes 0.50 always unpacks (``_gemm_4bit_custom_max_m``)."""
_MANAGED = 8
"""CU_POINTER_ATTRIBUTE_IS_MANAGED of the driver's ``cuda.h``."""


def runs(*cases):
    """Mark a GPU test with the cases that it records."""
    RUN.update(cases)
    return pytest.mark.gpu


@dataclass(frozen=True)
class Recorded:
    """One exported trace: its judgement, the rules that its names match, and the operators of the host."""

    summary: kernels_check.KernelSummary
    rules: frozenset[str]
    operators: frozenset[str]


@pytest.fixture
def record_step(tmp_path):
    """A function that profiles a call, exports the trace, reads it back and checks the rules of its case."""

    def record(case, call, *, warm=True):
        if warm:
            call()
        torch.cuda.synchronize()
        with quiet_kineto(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recording:
            call()
            torch.cuda.synchronize()
        path = tmp_path / "trace.json"
        recording.export_chrome_trace(str(path))
        trace = read_kineto(path, path.read_bytes())
        found = {classify(name) for name in trace.gpu.names} | {classify_operator(n) for n in trace.operators.names}
        rules = frozenset(rule.name for rule in found if rule is not None)
        assert rules >= EXPECTED[case], f"{EXPECTED[case] - rules} not in {sorted(rules)}; kernels {trace.gpu.names}"
        return Recorded(kernels_check.read_trace(path), rules, frozenset(trace.operators.names))

    return record


@pytest.fixture
def verified():
    """A function that verifies one path of a run."""

    def verify(run, path, required, step=None):
        check = run.check(path, required, step)
        assert check.met, check.reason

    return verify


def skip_where_refused(call):
    """Skip with torch's own reasons where SDPA has no kernel of the only allowed backend."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_KERNEL):
                raise
            pytest.skip("; ".join(str(one.message).partition(" (Triggered")[0] for one in caught) or str(error))


def many_tokens(run):
    """Give a run the number of tokens at which training unpacks."""
    run.inputs = {"input_ids": torch.randint(1, 96, TRAINING_TOKENS, device="cuda")}
    return run


@pytest.mark.parametrize("rule", GPU_RULES)
def test_every_rule_for_a_gpu_has_a_recording_that_must_show_it(rule):
    """Each GPU rule is expected in a case or listed in ELSEWHERE, where its evidence is a source or a published
    recording."""
    assert any(rule in rules for rules in EXPECTED.values()) is (rule not in ELSEWHERE)
    graded = next(one.evidence for one in ALL_RULES if one.name == rule)
    assert rule not in ELSEWHERE or set(graded.split(", ")) <= {"G", "S"}


def test_every_case_is_recorded_by_a_test_and_names_rules_that_exist():
    """Each expected case has a test that records it, and each expected rule exists."""
    assert set(EXPECTED) == RUN
    assert set().union(*EXPECTED.values()) | set(ELSEWHERE) <= {rule.name for rule in ALL_RULES}


@runs("flash", "cudnn", "efficient", "math")
@pytest.mark.parametrize("backend", SDPA)
def test_a_forced_backend_is_recognised_in_both_directions(training, record_step, verified, backend):
    """With only one SDPA backend enabled, the live step and the trace show that backend and no other, forward and
    backward."""
    if torch.version.hip:
        pytest.skip("kernels of CUDA: this torch is built for ROCm")
    run = training(device="cuda", tokens=64)
    run.step_context = partial(sdpa_kernel, SDPA[backend])
    if backend == "efficient":
        faults.pad_one_token(run)  # it refuses grouped heads, which transformers repeats where there is a mask
    skip_where_refused(run.step)
    verified(run, "attention.backend", backend)
    verified(run, "attention.dtype", "bfloat16")
    verified(run, "attention.mask", "explicit" if backend == "efficient" else "causal")
    recording = record_step(backend, run.step)
    assert set(recording.summary.attention.backends) == {backend}
    directions = {"ackward" in name for name in recording.operators if attention_backend(name) == backend}
    assert directions == {False, True}


@runs("flash on ROCm")
def test_flash_of_rocm_is_recognised_by_its_own_names(training, record_step):
    """AOTriton and CK run below the same operator as CUDA's flash attention."""
    if not torch.version.hip:
        pytest.skip("AOTriton and CK are ROCm's: this torch is built for CUDA")
    run = training(device="cuda", tokens=64)
    run.step_context = partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
    skip_where_refused(run.step)
    record_step("flash on ROCm", run.step)


def package_run(training, implementation):
    """Return a run with an attention package, or skip with transformers' message where it is not available."""
    try:
        return training(device="cuda", attention=implementation, tokens=64)
    except (ImportError, ValueError) as error:
        pytest.skip(f"{type(error).__name__}: {' '.join(str(error).split())}")


@runs("flash_attention_2", "flash_attention_2 before 2.7")
def test_flash_attention_2_is_distinguished_from_torchs_copy(training, record_step, verified):
    """The trace shows the package's kernels and operators, not those of SDPA; before 2.7 the kernels had no
    namespace."""
    run = package_run(training, "flash_attention_2")
    try:
        recent = Version(version("flash-attn")) >= Version("2.7")
    except PackageNotFoundError as error:
        pytest.skip(f"another kernel than the package's runs: {error}")
    if recent:
        verified(run, "attention.backend", "flash_attention_2")
    recording = record_step("flash_attention_2" if recent else "flash_attention_2 before 2.7", run.step)
    use = recording.summary.attention.backends["flash_attention_2" if recent else "flash_attention_2_vendored"]
    assert use.forward_calls > 0
    assert use.backward_calls > 0


@runs("flash_attention_3", "flash_attention_4")
@pytest.mark.parametrize("implementation", ["flash_attention_3", "flash_attention_4"])
def test_later_flash_attention_is_recognised_by_its_version(training, record_step, implementation):
    """The packages for Hopper and Blackwell are recognised by their own kernels."""
    run = package_run(training, implementation)
    assert run.check("attention.backend").observed == implementation
    recording = record_step(implementation, run.step)
    assert set(recording.summary.attention.backends) == {implementation}


@runs("flex")
def test_flex_attention_is_recognised(training, record_step):
    """The kernel is an Inductor template; uncompiled flex attention would be plain operators."""
    pytest.importorskip("triton")
    run = training(device="cuda", attention="flex_attention", tokens=128)
    try:
        run.step()
        check = run.check("attention.backend", "flex")
        assert check.met, check.reason
        assert set(record_step("flex", run.step).summary.attention.backends) == {"flex"}
    finally:
        torch._dynamo.reset()


@runs("another device's attention")
def test_attention_of_a_device_out_of_tree_has_its_operator(record_step):
    """No device in torch dispatches to this operator, so the test calls it directly: it raises, and is recorded."""
    query = torch.randn(1, 2, 16, 32, device="cuda")
    operator = torch.ops.aten._scaled_dot_product_fused_attention_overrideable

    def call():
        with pytest.raises(RuntimeError, match="overrideable"):
            operator(query, query, query)
        query.neg()

    record_step("another device's attention", call)


@runs("nf4 training", "fp4 training")
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_training_shapes_unpack_the_base(training, record_step, verified, quant):
    """With thousands of tokens the weights are unpacked for a bfloat16 product, in the requested format."""
    run = many_tokens(training(device="cuda", quant=quant, double=False, targets="all-linear"))
    for path, required in (
        ("base.bits", 4), ("base.quant_type", quant), ("base.double_quant", False),
        ("base.compute_dtype", "bfloat16"), ("base.gemm_path", "dequantize"), ("base.frozen", True),
    ):  # fmt: skip
        verified(run, path, required)
    recording = record_step(f"{quant} training", run.step)
    assert set(recording.summary.fourbit.paths) == {"dequantize"}
    assert set(recording.summary.fourbit.quant_types) == {quant}
    assert set(recording.summary.fourbit.dtypes) == {"bfloat16"}
    assert recording.summary.unclassified.time_share < 0.05, recording.summary.unclassified.names


@runs("double quantisation")
def test_double_quantisation_unpacks_its_scales(training, record_step, verified):
    """Double quantisation adds one kernel before each unpacking; without it there is none."""
    run = many_tokens(training(device="cuda", quant="nf4", double=True))
    verified(run, "base.double_quant", True)
    assert "dequantize_8bit" in record_step("double quantisation", run.step).summary.fourbit.paths
    plain = many_tokens(training(device="cuda", quant="nf4", double=False))
    assert "BNB-DEQ-8BIT" not in record_step("nf4 training", plain.step).rules


@runs("nf4 decoding")
@pytest.mark.parametrize("double", [False, True])
def test_one_token_is_multiplied_packed(training, record_step, verified, double):
    """Decoding uses the fused product and unpacks no weight."""
    run = training(device="cuda", quant="nf4", double=double, targets="all-linear")
    run.model.eval()
    token = run.inputs["input_ids"][:1, :1]

    @torch.no_grad()
    def decode():
        run.model(input_ids=token)

    verified(run, "base.gemm_path", "fused", decode)
    recording = record_step("nf4 decoding", decode)
    assert "fused" in recording.summary.fourbit.paths
    assert "BNB-DEQ-NF4" not in recording.rules


@runs("gemv", "quantise")
def test_the_older_product_of_one_token_has_its_rule(record_step):
    """bitsandbytes still has the older product as an operator; quantisation itself has a rule too."""
    functional = importlib.import_module("bitsandbytes.functional")
    weight = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    record_step("quantise", lambda: functional.quantize_4bit(weight, quant_type="nf4"))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    recording = record_step("gemv", lambda: functional.gemv_4bit(weight[:1], packed.t(), state=state))
    assert set(recording.summary.fourbit.paths) == {"gemv"}


@runs("int8")
def test_int8_quantises_its_inputs(record_step):
    """A real LLM.int8 layer quantises its inputs."""
    bnb = importlib.import_module("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(256, 256, bias=False, has_fp16_weights=False)
    weight = torch.randn(256, 256, dtype=torch.float16)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cuda")
    tokens = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    record_step("int8", lambda: layer(tokens))


def is_managed(tensor):
    """Return whether the driver reports the tensor's memory as managed; only managed memory can be paged."""
    found = ctypes.c_uint(0)
    driver = ctypes.CDLL("libcuda.so.1")
    code = driver.cuPointerGetAttribute(ctypes.byref(found), _MANAGED, ctypes.c_uint64(tensor.data_ptr()))
    return code == 0 and bool(found.value)


@runs("paged optimizer")
def test_the_paged_share_is_that_of_the_driver(training, record_step, verified):
    """State of large tensors is in managed memory, and the reported share equals the driver's."""
    run = training(device="cuda", rank=1024, make_optimizer=execution_faults.paged_adamw)
    record_step("paged optimizer", run.step, warm=False)  # the state is filled in the first step only
    state = [value for held in run.optimizer.state.values() for value in held.values() if torch.is_tensor(value)]
    distinct = {id(value): value for value in state}.values()
    share = sum(value.nbytes for value in distinct if is_managed(value)) / sum(value.nbytes for value in distinct)
    assert share > 0.4
    assert run.check("optimizer.paged_share", 0.4).observed == pytest.approx(share, abs=1e-6)
    verified(run, "optimizer.paged_share", 0.4)


@runs("8-bit optimizer")
def test_an_8_bit_optimizer_has_its_rule(training, record_step):
    """Tensors with at least 4096 elements have 8-bit moments."""
    bnb = importlib.import_module("bitsandbytes")
    run = training(device="cuda", rank=64, make_optimizer=partial(bnb.optim.AdamW8bit, lr=1e-3))
    record_step("8-bit optimizer", run.step)


@runs("fused optimizer", "foreach optimizer")
@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizers_implementation_is_recognised(training, record_step, verified, fused):
    """Fused and foreach updates are recognised by operator and kernel, each only where it was selected."""
    options = {"fused": True} if fused else {"foreach": True}
    run = training(device="cuda", make_optimizer=partial(torch.optim.AdamW, lr=1e-3, **options))
    verified(run, "optimizer.fused", fused)
    recording = record_step("fused optimizer" if fused else "foreach optimizer", run.step)
    assert ("OPT-TORCH-FUSED" in recording.rules) is fused


@runs("tf32 on", "tf32 off")
@pytest.mark.parametrize("on", [True, False])
def test_flag_number_and_kernel_agree_on_tf32(training, record_step, on):
    """The kernels and the flag of the live step, the error against float64, and the trace of one product agree."""
    if torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"TF32 needs compute capability 8.0: this is {torch.cuda.get_device_name()}")
    run = training(device="cuda", quant=None, dtype="float32", targets="all-linear")
    (faults.tf32_on if on else faults.tf32_off)(run)
    check = run.check("tf32", on)
    assert check.met, check.reason
    left, right = (torch.randn(1024, 1024, device="cuda") for _ in range(2))

    def product():
        with run.step_context():
            assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if on else "ieee")
            return left @ right

    exact = left.double() @ right.double()
    error = float((product().double() - exact).norm() / exact.norm())
    assert (3e-5 < error < 1e-3) if on else error < 3e-5
    recording = record_step("tf32 on" if on else "tf32 off", product)
    assert ("GEMM-TF32" in recording.rules) is on


@runs("bfloat16 product", "float16 product")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_number_format_of_a_product_is_read_from_its_kernel(record_step, dtype):
    """The kernel name of a square product on tensor cores gives its number format."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip(f"torch.cuda.is_bf16_supported() is False: {torch.cuda.get_device_name()}")
    left = torch.randn(1024, 1024, device="cuda", dtype=getattr(torch, dtype))
    recording = record_step(f"{dtype} product", lambda: left @ left)
    assert dtype in recording.summary.matmul_dtypes


@runs("matrix times vector")
def test_a_matrix_times_a_vector_is_a_product(record_step):
    """The kernel is cuBLAS's gemv, whose name gives no number format."""
    matrix = torch.randn(1024, 1024, device="cuda")
    recording = record_step("matrix times vector", lambda: torch.mv(matrix, matrix[0]))
    assert recording.summary.categories["matmul"] > 0.0


@runs("compiled")
def test_compiled_layers_run_inductors_kernels(training, record_step, verified):
    """The live step has compiled regions, and the trace has Triton kernels."""
    pytest.importorskip("triton")
    run = training(device="cuda", quant=None)
    run.model.enable_input_require_grads()  # otherwise the first layer is compiled for inputs without a gradient
    run.inputs["use_cache"] = False
    for layer in run.model.get_base_model().model.layers:
        layer.compile()
    try:
        run.step()
        verified(run, "compile", True)
        record_step("compiled", run.step)
    finally:
        torch._dynamo.reset()


@runs("Liger")
def test_ligers_norm_has_its_rule(record_step):
    """Forward and backward of Liger's RMS norm match its rules."""
    norms = pytest.importorskip("liger_kernel.transformers.rms_norm")
    norm = norms.LigerRMSNorm(256).to("cuda")
    tokens = torch.randn(64, 256, device="cuda", requires_grad=True)
    record_step("Liger", lambda: norm(tokens).sum().backward())


@runs("Unsloth")
def test_unsloths_kernels_have_their_rules(record_step):
    """Unsloth's norm, NF4 unpacking and one-token NF4 product match their rules."""
    pytest.importorskip("unsloth")
    kernels = importlib.import_module("unsloth.kernels")
    inside = importlib.import_module("unsloth.kernels.utils")
    functional = importlib.import_module("bitsandbytes.functional")
    weight = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    norm = nn.RMSNorm(256, eps=1e-6).to("cuda", torch.bfloat16)
    norm.variance_epsilon = 1e-6
    tokens = weight[None, :1]

    def call():
        kernels.fast_rms_layernorm(norm, tokens)
        inside.fast_dequantize(packed, state)
        inside.fast_gemv(tokens, packed, state)

    record_step("Unsloth", call)


@runs("Triton by hand")
def test_a_triton_kernel_is_recognised_by_its_name(record_step):
    """Kernels of other training libraries are identified by their names only."""
    triton = pytest.importorskip("triton")
    language = importlib.import_module("triton.language")

    @triton.jit
    def _rope_kernel(tokens, size: language.constexpr):
        places = language.arange(0, size)
        language.store(tokens + places, language.load(tokens + places) * 2)

    tokens = torch.ones(256, device="cuda")
    record_step("Triton by hand", lambda: _rope_kernel[(1,)](tokens, 256))


@runs("convolution")
def test_a_convolution_is_a_product_with_copies_around_it(record_step):
    """cuDNN copies tensors that are not channels-last; the copies do not count as a product."""
    layer = nn.Conv2d(3, 256, 14, 14, bias=False).to("cuda", torch.bfloat16)
    image = torch.randn(4, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    recording = record_step("convolution", lambda: layer(image))
    assert recording.summary.categories["matmul"] > 0.0
    assert recording.summary.categories["copy"] > 0.0


@runs("collective")
def test_a_collective_has_its_rule(record_step):
    """NCCL launches a kernel only with at least two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"NCCL launches no kernel for one GPU: {torch.cuda.device_count()} here")
    parts = [torch.ones(1024, device=f"cuda:{index}") for index in range(2)]
    recording = record_step("collective", lambda: torch.cuda.nccl.all_reduce(parts))
    assert recording.summary.categories["communication"] > 0.0


@pytest.mark.gpu
def test_attention_of_a_cuda_graph_is_known_by_its_kernels():
    """A graph replay calls no operator, so that the profiled kernels name the backend."""
    query = torch.randn(1, 4, 64, 32, device="cuda", dtype=torch.bfloat16)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def attend():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            scaled_dot_product_attention(query, query, query, is_causal=True)

    skip_where_refused(attend)
    with torch.cuda.stream(side):
        attend()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        attend()
    model = nn.Linear(8, 8).to("cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        graph.replay()
        optimizer.zero_grad()
        model(torch.ones(2, 8, device="cuda")).sum().backward()
        optimizer.step()

    checks = {check.path: check for check in kernels_check.verify(model, step, {})}
    assert checks["attention.backend"].observed == "flash"


@pytest.mark.gpu
def test_a_request_is_fused_as_a_step_is(training):
    """SDPA may select different backends for a prompt and for a single query, as on Hopper."""
    run = training(device="cuda", quant=None)
    run.model.eval()
    prompt = run.inputs["input_ids"][:1]

    @torch.no_grad()
    def request():
        run.model.generate(input_ids=prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)

    check = kernels_check.watch_request(run.model, request, "fused")
    assert check.met, check.reason


@pytest.fixture
def masked():
    """Inputs of attention in bfloat16 with an explicit mask."""
    tensors = [torch.randn(4, 32, 1024, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    return *tensors, torch.ones(4, 1, 1024, 1024, device="cuda", dtype=torch.bool).tril()


@pytest.mark.gpu
def test_flash_refuses_an_explicit_mask(masked):
    """Flash as the only allowed backend raises."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match=r"kernel|backend"):
        scaled_dot_product_attention(*masked)


@pytest.mark.gpu
def test_a_mask_is_taken_by_cudnn_on_hopper(masked):
    """An explicit mask is taken by cuDNN on Hopper and B200, and elsewhere by memory-efficient attention."""
    scaled_dot_product_attention(*masked)  # the first call fixes torch's order of backends
    chosen = SDPBackend(torch._fused_sdp_choice(*masked, 0.0, False)).name
    takes_it = torch.cuda.get_device_capability() in ((9, 0), (10, 0))
    assert chosen == ("CUDNN_ATTENTION" if takes_it else "EFFICIENT_ATTENTION")
