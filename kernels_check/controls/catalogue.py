"""Every negative control, as data."""

from __future__ import annotations

from kernels_check.controls.batches import BATCHES
from kernels_check.controls.control import Control
from kernels_check.controls.of_adapter import ADAPTER
from kernels_check.controls.of_attention import ATTENTION, PRODUCTS
from kernels_check.controls.of_everyday_code import EVERYDAY
from kernels_check.controls.of_execution import EXECUTION
from kernels_check.controls.of_fused_kernels import FUSED
from kernels_check.controls.of_the_base import BASE
from kernels_check.controls.of_the_loss import LOSS
from kernels_check.controls.of_trained_parts import TRAINED_PARTS
from kernels_check.controls.on_cuda import CUDA_CONTROLS

CONTROLS: tuple[Control, ...] = (
    *ATTENTION,
    *PRODUCTS,
    *BATCHES,
    *LOSS,
    *BASE,
    *ADAPTER,
    *TRAINED_PARTS,
    *EXECUTION,
    *FUSED,
    *EVERYDAY,
    *CUDA_CONTROLS,
)
