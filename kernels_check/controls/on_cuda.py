"""Negative controls that take a GPU to show, as data.

Each is the CUDA side of one that a CPU can only judge by its inputs.
"""

from __future__ import annotations

from kernels_check.controls import sabotage, sabotage_execution
from kernels_check.controls.control import Control, small

CUDA_CONTROLS = (
    Control(
        name="CUDA: a padding mask takes flash away",
        path="attention.backend",
        required="flash",
        sabotage=small(sabotage.only_flash_and_efficient, sabotage.pad_one_token, device="cuda"),
        twin=small(sabotage.only_flash_and_efficient, device="cuda"),
        words=("efficient", "an explicit mask (CUDA's flash refuses it"),
        needs_cuda="the CPU's flash accepts masks",
    ),
    Control(
        name="CUDA: float32 with grouped heads leaves only math",
        path="attention.backend",
        required="fused",
        sabotage=small(prepare=True, device="cuda"),
        twin=small(sabotage.use_autocast_on_cuda, prepare=True, device="cuda"),
        words=("math", "dtype float32", "grouped key/value heads"),
        needs_cuda="the CPU's flash accepts float32 and grouped heads",
    ),
    Control(
        name="CUDA: a head size that flash refuses",
        path="attention.backend",
        required="flash",
        sabotage=small(sabotage.only_flash_and_efficient, head_size=288, device="cuda"),
        twin=small(sabotage.only_flash_and_efficient, head_size=256, device="cuda"),
        words=("head size above 256",),
        needs_cuda="the CPU's flash accepts heads of any size",
    ),
    Control(
        name="CUDA: paged state of tensors that are too small",
        path="optimizer.paged_share",
        required=0.4,
        sabotage=small(make_optimizer=sabotage_execution.paged_adamw, device="cuda"),
        twin=small(make_optimizer=sabotage_execution.paged_adamw, rank=1024, device="cuda"),
        words=("state of tensors below 100000 elements is never paged",),
        needs_cuda="managed memory is CUDA's",
    ),
    Control(
        name="CUDA: tf32 switched off",
        path="tf32",
        required=True,
        sabotage=small(sabotage.tf32_off, quant=None, dtype="float32", device="cuda"),
        twin=small(sabotage.tf32_on, quant=None, dtype="float32", device="cuda"),
        words=("0 TF32", "fp32_precision"),
        instruments=("profile",),
        needs_cuda="TF32 is a format of CUDA's tensor cores",
    ),
)
