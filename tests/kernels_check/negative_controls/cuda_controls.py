"""Negative controls that take a GPU to show, as data.

Each is the CUDA side of one that a CPU can only judge by its inputs.
"""

from __future__ import annotations

from negative_controls import execution_faults, faults
from negative_controls.control import Control, small

CUDA_CONTROLS = (
    Control(
        name="CUDA: a padding mask takes flash away",
        path="attention.backend",
        required="flash",
        fault=small(faults.only_flash_and_efficient, faults.pad_one_token, device="cuda"),
        healthy=small(faults.only_flash_and_efficient, device="cuda"),
        words=("efficient", "an explicit mask (CUDA's flash refuses it"),
        needs_cuda="the CPU's flash accepts masks",
    ),
    Control(
        name="CUDA: float32 with grouped heads leaves only math",
        path="attention.backend",
        required="fused",
        fault=small(prepare=True, device="cuda"),
        healthy=small(faults.use_autocast_on_cuda, prepare=True, device="cuda"),
        words=("math", "dtype float32", "grouped key/value heads"),
        needs_cuda="the CPU's flash accepts float32 and grouped heads",
    ),
    Control(
        name="CUDA: a head size that flash refuses",
        path="attention.backend",
        required="flash",
        fault=small(faults.only_flash_and_efficient, head_size=288, device="cuda"),
        healthy=small(faults.only_flash_and_efficient, head_size=256, device="cuda"),
        words=("head size above 256",),
        needs_cuda="the CPU's flash accepts heads of any size",
    ),
    Control(
        name="CUDA: paged state of tensors that are too small",
        path="optimizer.paged_share",
        required=0.4,
        fault=small(make_optimizer=execution_faults.paged_adamw, device="cuda"),
        healthy=small(make_optimizer=execution_faults.paged_adamw, rank=1024, device="cuda"),
        words=("state of tensors below 100000 elements is never paged",),
        needs_cuda="managed memory is CUDA's",
    ),
    Control(
        name="CUDA: tf32 switched off",
        path="tf32",
        required=True,
        fault=small(faults.tf32_off, quant=None, dtype="float32", device="cuda"),
        healthy=small(faults.tf32_on, quant=None, dtype="float32", device="cuda"),
        words=("0 TF32", "fp32_precision"),
        needs_cuda="TF32 is a format of CUDA's tensor cores",
    ),
)
