"""What the harness and its documentation assume about GPUs, and the judge that decides each claim."""

from __future__ import annotations

from benchmarks.gpu.claim import Claim, by_tests
from benchmarks.gpu.judges import (
    all_settings_share_a_base,
    child_reads_nvml,
    cold_has_its_parts,
    counter_moves_often_enough,
    cudnn_takes_a_mask_on_hopper,
    estimate_is_near,
    events_agree,
    flash_refuses_a_mask,
    hand_over_costs_nothing,
    idle_clocks_are_left_out,
    kernels_are_told,
    lockstep_is_finer,
    names_are_known,
    new_lengths_cost_what_was_published,
    nobody_beats_the_peak,
    paging_waits_for_every_tensor,
    same_is_same,
    start_of_the_device_is_told,
    step_is_explained,
    study_is_valid,
    zygote_forks,
)
from benchmarks.gpu.steps import BASES

METERS, KERNELS = "tests/machine/test_gpu.py", "tests/kernels_check/test_gpu.py"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="fork",
        says="a zygote has one thread and leaves the device alone, and its children use it",
        judge=zygote_forks,
    ),
    Claim(
        name="counters",
        says="a counter that the GPU does not give is missing with its reason",
        judge=child_reads_nvml,
    ),
    Claim(
        name="events",
        says="a pair of device events times a step",
        judge=events_agree,
    ),
    Claim(
        name="wall",
        says="by the tests, events agree with the wall within 1 %",
        judge=by_tests(f"{METERS}::test_device_events_agree_with_the_wall"),
    ),
    Claim(
        name="hand-over",
        says="a hand-over between turns does not slow the next step down",
        judge=hand_over_costs_nothing,
    ),
    Claim(
        name="energy",
        says="the energy counter agrees with integrated power within 5 %",
        judge=by_tests(f"{METERS}::test_the_energy_counter_agrees_with_integrated_power"),
    ),
    Claim(
        name="energy period",
        says="the energy counter moves at least every 0.1 s",
        judge=counter_moves_often_enough,
    ),
    Claim(
        name="clocks",
        says="while work is queued, no reading of the clocks is one of an idle GPU",
        judge=idle_clocks_are_left_out,
    ),
    Claim(
        name="peaks of memory",
        says="the allocator's peaks are those of the phase, and NVML sees what the allocator takes",
        judge=by_tests(
            f"{METERS}::test_nvml_sees_what_the_allocator_takes",
            f"{METERS}::test_the_allocator_has_not_retried_where_memory_is_plenty",
            f"{METERS}::test_the_allocator_counts_what_it_could_not_have",
        ),
    ),
    Claim(
        name="account of memory",
        says="an account of memory explains a step's peak within 2 %",
        judge=by_tests(
            "tests/trial/profiling/test_memory_breakdown.py::test_a_step_on_a_gpu_is_explained_within_two_percent"
        ),
    ),
    Claim(
        name="estimate",
        says="the estimated peak of a 7B model is within 10 % of the measured one",
        judge=estimate_is_near,
    ),
    Claim(
        name="mask",
        says="flash refuses an explicit mask on CUDA",
        judge=flash_refuses_a_mask,
    ),
    Claim(
        name="names",
        says="the kernels of the usual products, attentions and norms have rules",
        judge=names_are_known,
    ),
    Claim(
        name="attention",
        says="each backend of attention is told from the others, live and in a recording",
        judge=by_tests(f"{KERNELS}::test_a_forced_backend_is_told_in_both_directions"),
    ),
    Claim(
        name="4 bits",
        says="unpacking and packed products of 4-bit weights are told by their kernels",
        judge=by_tests(
            f"{KERNELS}::test_training_shapes_unpack_the_base",
            f"{KERNELS}::test_double_quantisation_unpacks_its_scales",
            f"{KERNELS}::test_one_token_is_multiplied_packed",
        ),
    ),
    Claim(
        name="paged state",
        says="only tensors in managed memory count as paged, and some are",
        judge=by_tests(f"{KERNELS}::test_the_paged_share_is_what_the_driver_says"),
    ),
    Claim(
        name="TF32",
        says="TF32 is told by the kernels that ran",
        judge=by_tests(f"{KERNELS}::test_tf32_is_told_by_flag_by_number_and_by_kernel"),
    ),
    Claim(
        name="fused optimizer",
        says="fused and foreach optimizers are told by their kernels",
        judge=by_tests(f"{KERNELS}::test_the_optimizers_implementation_is_told"),
    ),
    Claim(
        name="faults",
        says="faults that only a GPU shows are found, their healthy controls pass",
        judge=by_tests("tests/kernels_check/test_negative_controls.py::test_control_on_cuda"),
    ),
    Claim(
        name="after the check",
        says="a step after the check is as fast as before it",
        judge=by_tests("tests/run/workers/test_gpu.py::test_a_step_is_as_fast_after_the_check_as_before"),
    ),
    Claim(
        name="stated peaks",
        says="products and copies reach a fair share of the vendor's figures and never more",
        judge=by_tests(
            "tests/trial/profiling/test_peak.py::test_products_on_a_known_gpu",
            "tests/trial/profiling/test_peak.py::test_copies_on_a_known_gpu",
        ),
    ),
    Claim(
        name="MFU",
        says="no step uses more than the stated peak",
        judge=nobody_beats_the_peak,
    ),
    *(
        Claim(
            name=f"phases, {title}",
            says=f"phases between events explain a step of Llama-2-7B in {title} within 2 %",
            judge=step_is_explained(variant),
        )
        for title, variant in zip(("bf16", "NF4"), BASES, strict=True)
    ),
    Claim(
        name="kernels of a step",
        says="what a profile of a 7B step records is kernels, and at most 1 % of their time has no name",
        judge=kernels_are_told,
    ),
    Claim(
        name="the study",
        says="Llama-2-7B in bf16 and in NF4: every trial is ok and every required path active",
        judge=study_is_valid,
    ),
    Claim(
        name="A/A",
        says="an A/B of the same code with itself sees no difference",
        judge=same_is_same,
    ),
    Claim(
        name="levels",
        says="a control that takes turns in lockstep is known better than one by whole replicates",
        judge=lockstep_is_finer,
    ),
    Claim(
        name="shared base",
        says="all settings of a sweep at 7B take turns on one base",
        judge=all_settings_share_a_base,
    ),
    Claim(
        name="cold start",
        says="a cold start on a GPU has its parts, each a number",
        judge=cold_has_its_parts,
    ),
    Claim(
        name="new lengths",
        says="where torch takes cuDNN's attention, a length of keys that is new costs the host some tens of ms",
        judge=new_lengths_cost_what_was_published,
    ),
    Claim(
        name="mask on Hopper",
        says="an explicit mask is taken by cuDNN on Hopper and B200, and elsewhere by memory-efficient attention",
        judge=cudnn_takes_a_mask_on_hopper,
    ),
    Claim(
        name="paging",
        says="a paged optimizer waits for the device after every tensor",
        judge=paging_waits_for_every_tensor,
    ),
    Claim(
        name="device start",
        says="what CUDA's own start takes is a number of isolated trials",
        judge=start_of_the_device_is_told,
    ),
)
