"""Bytes that autograd saves for the backward pass, in closed form.

Korthikanti et al. (2022, arXiv 2205.05198, section 4.1) count 34 bytes per token, layer and hidden unit for a dense
16-bit transformer. LoRA training differs: frozen weights have no gradient, so the input of a frozen layer is not saved;
but each adapter saves its own input, which PEFT casts to the adapter's dtype, and its r columns. The rest is as in
transformers' Llama: a norm saves its input in float32 and one number per token; attention saves its operands, its
output and a logarithm per row; the gated activation saves its three factors. A tensor that two operators save counts
once.

With checkpointing, a block saves only its input; the last norm is unaffected.
"""

from __future__ import annotations

from lorameter.models.costs.lora import adapted_widths, lora_of, width
from lorameter.models.families import STAGES
from lorameter.models.shapes import ModelShape, family_of, linear_layers, linear_widths
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload


class Activations:
    """Bytes that are saved for one micro-batch. `device` is "cpu" or "cuda", which differ in the dropout mask.

    Raises `UnknownLayersError` if the model's layers are unknown.
    """

    def __init__(self, variant: Variant, workload: Workload, shape: ModelShape, device: str) -> None:
        self._variant = lora_of(variant, shape)
        self._shape = shape
        self._rows, self._length = workload.batch_size, workload.sequence_length
        self._tokens = self._rows * self._length
        self._adapted = adapted_widths(variant, shape)
        self._family = family_of(shape)
        layers = linear_layers(shape)
        self._stages = {stage: [name for name in self._adapted if layers[name].stage == stage] for stage in STAGES}
        self._stream = 4 if variant.prepare_for_kbit else width(variant.dtype)
        self._adapter = width(variant.adapter_dtype or "float32")
        cast = variant.autocast
        self._product = self._adapter if cast is None else width(cast)
        self._attention = self._stream if cast is None else width(cast)
        # The output of a quantised layer has the dtype of its input, also under autocast.
        self._gated = self._stream if cast is None or variant.quantization != "none" else width(cast)
        self._casts = cast is not None and width(cast) != self._stream
        self._mask = self._adapter if device == "cpu" else 1
        """Bytes of an element of the dropout mask, which on a CPU is a factor in the dtype of the input."""
        self._cast_adapter = 0 if cast is None or self._product == self._adapter else self._product
        """Bytes of an element of an adapter's weight in the autocast dtype, 0 if it is not cast."""
        self._shared = self._product == self._adapter == self._stream
        """Whether adapters share their input; otherwise each has a copy in its own dtype."""

    def sum_kept(self) -> int:
        """Bytes for the whole model, without the logits."""
        shape = self._shape
        outside = self._norm() + (shape.vocab_size * shape.hidden_size * self._attention if self._casts else 0)
        if self._variant.gradient_checkpointing:  # checkpointing needs the gradient of the embeddings
            return shape.layers * self._tokens * shape.hidden_size * self._stream + outside
        return shape.layers * self.block() + self._rotary() - self._not_first() + outside

    def block(self) -> int:
        """Bytes for one block at the beginning of its backward pass."""
        gated = 3 * self._tokens * self._shape.intermediate_size * self._gated
        total = self._family.norms * self._norm() + self._adapters() + self._attended() + gated
        if self._casts and self._variant.quantization == "none":
            # Autocast casts frozen weights in each product, and the backward pass needs the copies.
            total += sum(inputs * outputs for inputs, outputs in linear_widths(self._shape).values()) * self._attention
        return total

    def _norm(self) -> int:
        return self._normed(self._tokens, self._shape.hidden_size)

    def _normed(self, rows: int, wide: int) -> int:
        """Bytes for one norm over rows of this width."""
        return rows * (4 * wide + 4) + (4 * wide if self._family.shifted_norms else 0)

    def _rotary(self) -> int:
        """Bytes for cosine and sine, once for all blocks with the same rotary embedding."""
        kinds = 2 if 0 < self._family.global_every <= self._shape.layers else 1
        return kinds * 2 * self._tokens * self._shape.head_dim * self._stream

    def _not_first(self) -> int:
        """Bytes that blocks after the first save for the gradient of their input."""
        entering = [self._adapted[name] for name in self._stages["entering"]]
        unwanted = self._norm() + sum(self._variant.r * inputs for inputs, _ in entering) * self._cast_adapter
        if self._variant.lora_dropout:
            unwanted += self._tokens * self._mask * sum(inputs for inputs, _ in entering)
        if not entering:  # nothing before the attention needs a gradient
            unwanted += self._attended() + (0 if self._stages["attended"] else self._norm())
        return unwanted

    def _adapters(self) -> int:
        names, size, r = self._adapted, self._product, self._variant.r
        total = self._tokens * r * size * len(names)
        for stage, group in self._stages.items():
            inputs = [names[name][0] for name in group]
            if self._shared:
                # The adapter of the output projection shares the saved attention output, unless that is copied.
                same = stage == "attended" and self._variant.attention != "eager" and not self._variant.lora_dropout
                total += 0 if same else self._tokens * size * max(inputs, default=0)
            else:
                total += self._tokens * size * sum(inputs)
            if self._variant.lora_dropout:
                total += self._dropped(inputs)
        if self._variant.use_dora:
            total += self._dora()
        return total + sum(r * (inputs + outputs) for inputs, outputs in names.values()) * self._cast_adapter

    def _dropped(self, inputs: list[int]) -> int:
        """Bytes for the masks, and for the adapters' inputs, which can no longer be shared."""
        copies = self._tokens * self._product * (sum(inputs) - max(inputs, default=0)) if self._shared else 0
        return self._tokens * self._mask * sum(inputs) + copies

    def _dora(self) -> int:
        """PEFT computes the norm through the product with an identity matrix, which A saves. With dropout it multiplies
        by the frozen weight a second time, in the adapter's dtype."""
        total, dropped = 0, self._variant.lora_dropout > 0
        for inputs, outputs in self._adapted.values():
            total += self._adapter * (inputs * inputs + inputs * self._variant.r) + 12 * outputs
            total += self._tokens * outputs * (self._adapter + (self._adapter if dropped else self._stream))
            total += inputs * outputs * self._adapter if dropped and not self._shared else 0
        return total

    def _attended(self) -> int:
        """Bytes for the attention, with the query and key norms of each head in families that have them."""
        shape, size = self._shape, self._attention
        heads = (shape.heads, shape.kv_heads) if self._family.normed_heads else ()
        return self._scored(shape, size) + sum(self._normed(self._tokens * count, shape.head_dim) for count in heads)

    def _scored(self, shape: ModelShape, size: int) -> int:
        query = self._tokens * shape.heads * shape.head_dim * size
        key = self._tokens * shape.kv_heads * shape.head_dim * size
        pairs = self._rows * self._length**2
        if self._variant.attention == "eager":  # scores in float32, and again in the dtype of the values
            return 3 * query + pairs * shape.heads * (4 + (size if size < 4 else 0))
        logarithms = self._tokens * shape.heads * 4
        if self._variant.attention == "sdpa":  # packed or padded: a mask, and keys repeated for each query head
            repeats = shape.kv_heads > 1 or self._casts  # with a single key/value head they are views
            return 2 * query + 2 * (query if repeats else key) + logarithms + pairs * size
        return 2 * query + 2 * key + logarithms
