"""The claims of the harness and its documentation about GPUs, each with the judge that decides it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from benchmarks.gpu import judges
from benchmarks.gpu.claim import Claim, Judge, by_tests
from benchmarks.gpu.steps import BASE_VARIANTS

METERS, KERNELS = "tests/machine/test_gpu.py", "tests/kernels_check/test_gpu.py"
WORKERS = "tests/run/workers/test_gpu.py"
PROFILING = "tests/trial/profiling/test_trial.py"


def _claims(steps: tuple[str, ...], claims: Mapping[str, tuple[str, Judge]]) -> tuple[Claim, ...]:
    return tuple(Claim(name=name, says=says, judge=judge, steps=steps) for name, (says, judge) in claims.items())


TITLES = dict(zip(BASE_VARIANTS, ("bf16", "NF4"), strict=True))
CLAIMS: tuple[Claim, ...] = (
    *_claims(
        ("tests-trial",),
        {
            "fork": (
                "a zygote has one thread and leaves the device alone, and its children use it",
                by_tests(f"{WORKERS}::test_a_child_of_the_zygote_uses_the_gpu"),
            ),
        },
    ),
    *_claims(
        ("tests-paths",),
        {
            "counters": (
                "a counter that the GPU does not give is missing with its reason",
                by_tests(f"{METERS}::test_every_counter_has_a_value_or_a_reason"),
            ),
            "hand-over": (
                "a hand-over between turns slows the next step down by 1 % at most",
                by_tests(f"{METERS}::test_a_hand_over_does_not_slow_the_next_step_down"),
            ),
            "energy period": (
                "the energy counter moves at least every 0.1 s",
                by_tests(f"{METERS}::test_the_energy_counter_moves_at_least_once_a_period"),
            ),
            "clocks": (
                "while work is queued, no reading of the clocks is one of an idle GPU",
                by_tests(f"{METERS}::test_a_gpu_with_queued_work_is_not_idle"),
            ),
            "mask": (
                "flash refuses an explicit mask on CUDA",
                by_tests(f"{KERNELS}::test_flash_refuses_an_explicit_mask"),
            ),
            "mask on Hopper": (
                "an explicit mask is taken by cuDNN on Hopper and B200, and elsewhere by memory-efficient attention",
                by_tests(f"{KERNELS}::test_a_mask_is_taken_by_cudnn_on_hopper"),
            ),
            "attention": (
                "each backend of attention is recognised, live and in a recording",
                by_tests(f"{KERNELS}::test_a_forced_backend_is_recognised_in_both_directions"),
            ),
            "4 bits": (
                "unpacking and packed products of 4-bit weights are recognised by their kernels",
                by_tests(
                    f"{KERNELS}::test_training_shapes_unpack_the_base",
                    f"{KERNELS}::test_double_quantisation_unpacks_its_scales",
                    f"{KERNELS}::test_one_token_is_multiplied_packed",
                ),
            ),
            "paged state": (
                "only tensors in managed memory count as paged, and some are",
                by_tests(f"{KERNELS}::test_the_paged_share_is_that_of_the_driver"),
            ),
            "TF32": (
                "TF32 is recognised by the kernels that ran",
                by_tests(f"{KERNELS}::test_flag_number_and_kernel_agree_on_tf32"),
            ),
            "fused optimizer": (
                "fused and foreach optimizers are recognised by their kernels",
                by_tests(f"{KERNELS}::test_the_optimizers_implementation_is_recognised"),
            ),
            "wall": (
                "device events agree with the wall within 1 %",
                by_tests(f"{METERS}::test_device_events_agree_with_the_wall"),
            ),
            "energy": (
                "the energy counter agrees with integrated power within 5 %",
                by_tests(f"{METERS}::test_the_energy_counter_agrees_with_integrated_power"),
            ),
            "peaks of memory": (
                "the allocator's peaks, retries and failures are those of the phase",
                by_tests(
                    f"{METERS}::test_the_allocator_has_not_retried_where_memory_is_plenty",
                    f"{METERS}::test_the_allocator_counts_retries_and_failed_allocations",
                ),
            ),
        },
    ),
    *_claims(
        ("study",),
        {
            "the study": (
                "Llama-2-7B in bf16 and in NF4: every trial is ok and every required path active",
                partial(judges.judge_study, step="study"),
            ),
            "warm requests": (
                "a warm request has a first token and an end, on either base",
                judges.judge_warm_requests,
            ),
            "cold start": ("a cold start has its parts, each a number", judges.judge_cold_start),
            "device start": ("isolated trials record how long CUDA takes to start", judges.judge_device_start),
            "energy of steps": (
                "an isolated trial records clocks and the energy of its steps",
                judges.judge_energy,
            ),
        },
    ),
    *(
        Claim(
            name=f"estimate, {title}",
            says=f"the measured peak of training in {title} is within -11 % to +34 % of the estimated one",
            judge=partial(judges.judge_estimate, variant=base),
            steps=("study", f"estimate-{base}"),
        )
        for base, title in TITLES.items()
    ),
    *_claims(
        ("sweep",),
        {"shared base": ("all settings of a sweep at 7B take turns on one base", judges.judge_shared_base)},
    ),
    *_claims(
        ("sweep", "claims"),
        {
            "LoRA parameters": (
                "every claim of time about alpha, dropout and r is decided on Llama-2-7B",
                judges.judge_study_claims,
            ),
        },
    ),
    *_claims(
        ("twins",),
        {
            "A/A": ("an A/B of identical code sees no difference", judges.judge_identical_code),
            "A/B": ("an injected slow-down is called regressed", judges.judge_slowdown),
        },
    ),
    *_claims(
        ("tests-controls",),
        {
            "faults": (
                "faults that only a GPU shows are found, their healthy controls pass",
                by_tests(
                    "tests/kernels_check/test_verification.py::test_a_fault_on_a_gpu_is_found_and_its_healthy_control_passes"
                ),
            ),
        },
    ),
    *_claims(
        ("tests-trial",),
        {
            "after the check": (
                "a step after the check is as fast as before it",
                by_tests(f"{WORKERS}::test_a_step_is_as_fast_after_the_check_as_before"),
            ),
            "stated peaks": (
                "products and copies reach a fair share of the vendor's figures and never more",
                by_tests(f"{PROFILING}::test_products_on_a_known_gpu", f"{PROFILING}::test_copies_on_a_known_gpu"),
            ),
            "account of memory": (
                "an account of memory explains a step's peak within 2 %",
                by_tests(f"{PROFILING}::test_a_step_on_a_gpu_is_explained_within_two_percent"),
            ),
        },
    ),
    *(
        Claim(
            name=f"phases, {title}",
            says=f"phases between events explain a step of Llama-2-7B in {title} within 2 %",
            judge=partial(judges.judge_step_phases, variant=base),
            steps=(f"profile-{base}",),
        )
        for base, title in TITLES.items()
    ),
    *_claims(
        tuple(f"profile-{base}" for base in BASE_VARIANTS),
        {
            "kernels of a step": (
                "a profile of a 7B step records kernels, and at most 1 % of their time is in unknown ones",
                judges.judge_kernels,
            ),
            "MFU": ("no step uses more than the stated peak", judges.judge_peak_share),
        },
    ),
    *_claims(
        ("wrap",),
        {"wrapped script": ("a script under `lorameter wrap` is measured on the GPU", judges.judge_wrapped_script)},
    ),
    *_claims(
        ("compile",),
        {"compile": ("compiled trials run compiled steps", partial(judges.judge_study, step="compile"))},
    ),
    *_claims(("liger",), {"Liger": ("trials with Liger run its kernels", partial(judges.judge_study, step="liger"))}),
)
