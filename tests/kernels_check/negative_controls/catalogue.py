"""Every negative control, as data."""

from __future__ import annotations

from negative_controls.adapter_controls import ADAPTER
from negative_controls.attention_controls import ATTENTION, PRODUCTS
from negative_controls.base_controls import BASE
from negative_controls.batch_controls import BATCHES
from negative_controls.control import Control
from negative_controls.cuda_controls import CUDA_CONTROLS
from negative_controls.execution_controls import EXECUTION
from negative_controls.fused_kernel_controls import FUSED
from negative_controls.healthy_variants import EVERYDAY
from negative_controls.loss_controls import LOSS
from negative_controls.trained_part_controls import TRAINED_PARTS

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
