"""Estimates the times of a step and of a request, using a model with only two of its decoder layers.

The timed step has both layers, embedding, head, loss and optimizer. The remaining layers count like the second one,
since nothing before the first one needs a gradient. Weights and tokens are random.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.records.record import PartialRecord
from lorameter.studies.request import TrialRequest
from lorameter.trial.building.base_model import evaluation_mode, read_architecture
from lorameter.trial.building.build import SharedBase, build
from lorameter.trial.data.stream import Batch
from lorameter.trial.process import prepare_process, synchronize
from lorameter.trial.serving.server import generate
from lorameter.trial.step import TrainStep

LAYERS = 2


def time_parts(request: TrialRequest) -> PartialRecord:
    """Seconds of the whole model, as values: `load` (building it with its adapter), `step`, `evaluate` (a batch without
    gradients) and `request`.

    Args:
        request: variant, workload and device; the shortened configuration is written to its scratch folder.

    Raises:
        UsageError: the model cannot be built, or has no list of decoder layers.
    """
    prepare_process(request)
    source = catalogue.resolve(request.workload.model)
    layers = shapes.shape(source).layers
    config = shorten_config(json.loads(read_architecture(source).to_json_string(use_diff=False)), layers)
    folder = Path(request.scratch)
    (folder / "config.json").write_text(json.dumps(config))
    workload = dataclasses.replace(request.workload, model=f"{catalogue.RANDOM_PREFIX}{folder}")
    variant = dataclasses.replace(request.variant, compile=False)  # compiling would take longer than all the rest
    request = dataclasses.replace(request, workload=workload, variant=variant, base="")

    begin = time.perf_counter()
    trainee = build(request, steps=1, shared=SharedBase())
    load_s = time.perf_counter() - begin
    lists = [module for module in trainee.model.modules() if isinstance(module, torch.nn.ModuleList)]
    stack = next((module for module in lists if len(module) == LAYERS), None)
    if stack is None:
        raise UsageError(f"the model {source.label} has no list of decoder layers.")
    clock = _LayerClock(stack[1], request.device)
    vocabulary = shapes.shape(catalogue.resolve(workload.model)).vocab_size

    def draw(rows: int, length: int) -> torch.Tensor:
        return torch.randint(vocabulary, (rows, length), device=request.device)

    def take() -> Batch:
        tokens = draw(workload.batch_size, workload.sequence_length)
        return {"input_ids": tokens, "labels": tokens}

    stream: Any = SimpleNamespace(take=take, held_out=lambda: [take()])  # the methods of a `TokenStream` for a step
    step = TrainStep(trainee, stream, variant, request.device)

    def seconds(act: Callable[[], object]) -> float:
        """Seconds of a call in the whole model: the faster of two calls, since the first one allocates memory that
        later ones reuse."""
        return min(clock.time(act, layers - LAYERS) for _ in range(2))

    step_s, evaluate_s = seconds(step), seconds(step.held_out_loss)
    with evaluation_mode(trainee.model):
        prompts = draw(workload.request_batch, workload.prompt_tokens)
        request_s = seconds(lambda: generate(trainee.model, prompts, workload.new_tokens, variant=variant))
    layer, short = (sum(one.numel() for one in part.parameters()) for part in (stack[1], trainee.model))
    times = {
        "load": load_s * (1 + (layers - LAYERS) * layer / short),
        "step": step_s,
        "evaluate": evaluate_s,
        "request": request_s,
    }
    return PartialRecord(values=times)


def shorten_config(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A model's configuration reduced to two of its `layers`, including its per-layer lists."""
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) and nested else config
    short = {
        key: value[:LAYERS] if isinstance(value, list) and len(value) == layers else value
        for key, value in text.items()
    }
    short |= {key: LAYERS for key in shapes.LAYER_KEYS if key in text}
    return config | {"text_config": short} if text is nested else short


class _LayerClock:
    """Adds up the seconds of a module's forward and backward passes."""

    def __init__(self, layer: torch.nn.Module, device: str) -> None:
        self._device = device
        self._seconds = self._begun = 0.0
        layer.register_forward_pre_hook(self._begin)
        layer.register_forward_hook(self._end)
        layer.register_full_backward_pre_hook(self._begin)
        layer.register_full_backward_hook(self._end)

    def time(self, act: Callable[[], object], more: int) -> float:
        """Seconds of a call, plus `more` times the seconds of the layer."""
        self._seconds = 0.0
        begin = self._now()
        act()
        return self._now() - begin + more * self._seconds

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()

    def _begin(self, *_: object) -> None:
        self._begun = self._now()

    def _end(self, *_: object) -> None:
        self._seconds += self._now() - self._begun
