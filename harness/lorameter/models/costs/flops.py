"""Computes the FLOPs of LoRA training, in closed form and without torch.

A product of an (m, k) by a (k, n) matrix is 2 m k n FLOPs. Only matrix products count, as in torch's FlopCounterMode:
norms, activations, rotary embedding, softmax, loss and optimizer touch each element a fixed number of times.

A frozen linear layer needs 2 FLOPs per weight and position in the forward pass, and 2 in the backward pass for the
gradient of its input. The last third of the 6 N of full training (Kaplan et al. 2020, arXiv 2001.08361, section 2.1),
the weight gradient, is not needed: LoRA training is about 4 N, plus the adapter's share. No gradient is computed before
the first trained layer: the inputs of the first block need none.

Attention is counted per query-key pair: 2 products in the forward pass (scores, values), and in the backward pass one
for the gradient of each of its operands (Chowdhery et al. 2022, arXiv 2204.02311, appendix B, where all pairs of a row
count). The caller gives the number of pairs (`StepTokens`): all pairs of an operator, or only those that the mask lets
through.

Additional computation, which an ideal implementation would not need, is counted separately: products that are repeated
(by checkpointing, and the scores that a fused backward recomputes; Dao 2023, arXiv 2307.08691, section 3.1), and
gradients that nothing uses.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lorameter.errors import refused_value
from lorameter.models.costs.lora import adapted_widths, as_lora
from lorameter.models.shapes import STAGES, ModelShape, find_family, linear_elements, linear_layers, linear_widths
from lorameter.studies.variant import ALL_LINEAR, LoraVariant, Variant
from lorameter.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """Tokens and pairs of one optimizer step, including all its micro-batches."""

    positions: int
    """Tokens: rows of every linear product."""
    pairs: int
    """Query-key pairs, for one head of one layer."""
    passes: int = 1
    """Number of forward passes; work that does not depend on tokens (DoRA's norm) runs once in each."""


def computed_tokens(variant: Variant, workload: Workload) -> StepTokens:
    """Tokens and pairs that the operators of a step compute, including padding, and every pair of a row, masked or not.

    FlopCounterMode counts them, and a kernel with an explicit mask computes them. A kernel that skips masked pairs
    (flash attention, causal or of variable length) computes fewer, down to the pairs within each record.
    """
    positions = workload.batch_size * variant.gradient_accumulation * workload.sequence_length
    pairs = positions * workload.sequence_length
    return StepTokens(positions=positions, pairs=pairs, passes=variant.gradient_accumulation)


def row_tokens(variant: Variant, workload: Workload) -> StepTokens:
    """Tokens and pairs that a step needs if each row is one causal sequence without padding: n (n + 1) / 2 pairs for n
    tokens. Packed rows need fewer pairs, since their records do not attend to each other."""
    every = computed_tokens(variant, workload)
    return dataclasses.replace(every, pairs=every.positions * (workload.sequence_length + 1) // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFlops:
    """FLOPs of one optimizer step."""

    model: int
    """FLOPs that any implementation of the step needs: the numerator of MFU."""
    extra: int
    """FLOPs that are repeated (the forward pass of each block with checkpointing, and the scores in a fused backward)
    or unused (gradients of the embeddings with checkpointing, gradients of operands that a fused backward always
    computes, and the product with an identity matrix in PEFT's DoRA)."""

    @property
    def hardware(self) -> int:
        """All FLOPs that the device executes: the numerator of hardware utilisation."""
        return self.model + self.extra


def training_flops(shape: ModelShape, variant: Variant, tokens: StepTokens) -> TrainingFlops:
    """FLOPs of one optimizer step.

    rsLoRA and dropout add no product. A quantised layer counts like any other, since dequantisation is not a product;
    LLM.int8's second product for outlier columns, which depends on the data, is omitted. Checkpointing is torch's
    non-reentrant variant, which stops a block's second forward pass at the last tensor that its backward pass needs, so
    the block's last product is not repeated.

    Raises:
        UsageError: the layers of the model type or of a target are unknown.
    """
    block = _Block(shape, variant, tokens)
    first, first_extra = block.backward(entering=False)
    other, other_extra = block.backward(entering=True)
    head = 2 * 2 * tokens.positions * shape.vocab_size * shape.hidden_size
    extra = shape.layers * block.identity + first_extra + (shape.layers - 1) * other_extra
    if variant.gradient_checkpointing:  # checkpointing needs the gradient of the embeddings
        extra += shape.layers * (block.forward + block.identity - block.tail())
        extra += other + other_extra - first - first_extra
    return TrainingFlops(
        model=shape.layers * block.forward + first + (shape.layers - 1) * other + head,
        extra=extra,
    )


class _Block:
    """The products of one block, and the gradients that it needs."""

    def __init__(self, shape: ModelShape, variant: Variant, tokens: StepTokens) -> None:
        variant = as_lora(variant, shape)
        self._layers, widths = linear_layers(shape), linear_widths(shape)
        _check_targets(variant, shape)
        self._adapted = adapted_widths(variant, shape)
        self._training = {*self._adapted, *(find_family(shape).biased if variant.bias == "all" else ())}
        self._fused = variant.attention != "eager"
        self._dora = variant.use_dora
        self._twice = variant.use_dora and variant.lora_dropout > 0  # PEFT multiplies by the frozen weights again
        rows, r = 2 * tokens.positions, variant.r
        self._through = {name: rows * inputs * outputs for name, (inputs, outputs) in widths.items()}
        self._a = {name: rows * inputs * r for name, (inputs, _) in self._adapted.items()}
        self._b = {name: rows * r * outputs for name, (_, outputs) in self._adapted.items()}
        self._pairs = 2 * tokens.pairs * shape.heads * shape.head_dim  # grouped keys are repeated for each query head
        self.forward = sum(self._through.values()) + sum(self._a.values()) + sum(self._b.values()) + 2 * self._pairs
        """FLOPs that a forward pass needs."""
        self.identity = 0
        """FLOPs for the norm of W + BA, which needs BA: PEFT passes an identity matrix through A and then B."""
        if self._twice:
            self.forward += sum(self._through[name] for name in self._adapted)
        if self._dora:
            sizes = self._adapted.values()
            self.forward += tokens.passes * sum(2 * inputs * r * outputs for inputs, outputs in sizes)
            self.identity = tokens.passes * sum(2 * inputs * inputs * r for inputs, _ in sizes)

    def backward(self, *, entering: bool) -> tuple[int, int]:
        """FLOPs that a backward pass needs, and those that a fused attention computes in addition. `entering`: whether
        the gradient of the block's input is needed. DoRA's norm is treated as constant (Liu et al. 2024, arXiv
        2402.09353, section 4.3) and has no gradient."""
        places = {name: STAGES.index(layer.stage) for name, layer in self._layers.items()}
        first = min((places[name] for name in self._training), default=len(STAGES))
        # The gradient of a layer's input is needed if an earlier layer trains.
        needing = [name for name, place in places.items() if entering or first < place]
        needed = sum(self._through[name] for name in needing)
        for name in self._adapted:
            needed += self._a[name] + 2 * self._b[name]
            if name in needing:
                needed += self._a[name] + (self._through[name] if self._twice else 0)
        trained_operands = {operand for name in self._training for operand in self._layers[name].makes}
        query, key, value = (entering or operand in trained_operands for operand in ("query", "key", "value"))
        operands = (query or key) + query + key + value  # the first is that of the scores
        again = 1 + 4 - operands if self._fused and operands else 0
        return needed + operands * self._pairs, again * self._pairs

    def tail(self) -> int:
        """FLOPs after the last saved tensor, which a block's second forward pass with checkpointing omits."""
        last = [name for name, layer in self._layers.items() if layer.stage == STAGES[-1]]
        plain = sum(self._through[name] for name in last if name not in self._adapted)
        return plain + (0 if self._dora else sum(self._b[name] for name in last if name in self._adapted))


def _check_targets(variant: LoraVariant, shape: ModelShape) -> None:
    """Raise `UsageError` for a target that is not a linear layer of every block, such as the head."""
    widths, known = linear_widths(shape), find_family(shape).parents
    for target in variant.target_modules if variant.target_modules != (ALL_LINEAR,) else ():
        *parents, name = target.split(".")
        if name not in widths or not set(parents) <= set(known):
            raise refused_value(
                "flops", "target_modules", target, f"only {', '.join(widths)} of every block are counted",
                'Name these, or use ("all-linear",).',
            )  # fmt: skip


def six_n(shape: ModelShape, tokens: StepTokens) -> int:
    """6 N for each position, without attention: the FLOPs of training all weights, for comparison only. N counts the
    head, but not the embedding (a table look-up).

    Published figures for LoRA often use it, and are 1.5 times the true count.

    Raises:
        UsageError: the layers of the model type are unknown.
    """
    return 6 * (linear_elements(shape) + shape.vocab_size * shape.hidden_size) * tokens.positions


def mean_context(workload: Workload) -> int:
    """Mean number of tokens, including itself, to which a token after the first one of a request attends.

    With p prompt tokens and n new ones, the forward passes after the first attend to p + 1 ... p + n - 1 tokens.
    """
    return workload.prompt_tokens + workload.new_tokens // 2
