"""A variant: one fine-tuning configuration, and nothing about how it is measured.

The fields carry the names that PEFT, transformers and bitsandbytes give them, so that a variant reads like the
code that it describes. What can be judged from the values alone is refused here; what depends on the model or the
machine is judged in `feasibility`. Defaults are those of the QLoRA paper's recipe (Dettmers et al. 2023, arXiv
2305.14314) where PEFT itself has no opinion.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import Literal

from lorameter.errors import UsageError, shorten
from lorameter.records import codec
from lorameter.studies import limits, script

DType = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "nf4", "fp4"]
Attention = Literal["sdpa", "flash_attention_2", "eager", "flex_attention"]
Optimizer = Literal["adamw", "adamw_fused", "paged_adamw_32bit", "paged_adamw_8bit"]
Schedule = Literal["constant", "linear", "cosine"]
Bias = Literal["none", "all", "lora_only"]
KeyValueCache = Literal["dynamic", "static"]
Init = Literal["default", "gaussian", "olora", "pissa", "orthogonal"]

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output head."""

ADAPTER_FIELDS = frozenset(
    ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "init_lora_weights")
)
"""Fields in which variants on one base may differ: they belong to the adapter, and the base never learns of them."""
OF_4BIT = ("double_quant", "compute_dtype")
"""Fields that are read only where the base is stored in 4 bits."""

_LEAST = {
    "r": 1,
    "lora_dropout": 0,
    "warmup_ratio": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "gradient_accumulation": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One configuration of LoRA, quantisation, attention and optimizer; the group key of every result.

    `name` is a label and no part of the identity: two variants that differ in name only are the same variant.
    Raises `UsageError` for a value that no machine could run, naming the key, the value and the remedy.
    """

    name: str = field(default="", compare=False)

    r: int = 16
    """Rank of the update, LoRA's r (Hu et al. 2021, arXiv 2106.09685)."""
    lora_alpha: float = 16.0
    """Numerator of the scaling alpha / r (alpha / sqrt(r) with `use_rslora`)."""
    lora_dropout: float = 0.0
    """Probability with which an input of the adapter is zeroed in training."""
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Suffixes of module names; ("all-linear",) is every linear layer but the head; () is PEFT's own default."""
    bias: Bias = "none"
    """Biases that train with the adapter, as PEFT names them."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction separately (Liu et al. 2024, arXiv 2402.09353)."""
    init_lora_weights: Init = "default"
    """How the adapter begins, as PEFT names it."""

    dtype: DType = "bfloat16"
    """Type of the base weights that are not quantised."""
    quantization: Quantization = "none"
    """How the weights of the base are stored, by bitsandbytes; "none" leaves them in `dtype`."""
    double_quant: bool = True
    """Quantise the quantisation constants too; read only for nf4 and fp4."""
    compute_dtype: DType = "bfloat16"
    """Type in which a 4-bit layer multiplies; read only for nf4 and fp4. bitsandbytes' own default is float32."""
    prepare_for_kbit: bool = False
    """peft.prepare_model_for_kbit_training: casts what is not quantised to float32 (norms, embeddings, head)."""
    adapter_dtype: DType | None = None
    """Type of the adapter weights; None leaves it to PEFT, which casts them to float32."""

    attention: Attention = "sdpa"
    """Implementation of attention, as transformers names it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    autocast: DType | None = None
    """Autocast type of the forward pass; None runs without autocast."""
    tf32: bool = False
    """Let products of float32 run in TF32 on a GPU."""
    compile: bool = False
    """Compile the model with torch.compile, in caches of the trial's own."""
    liger_kernel: bool = False
    """Patch the base with the Triton kernels of liger-kernel, all that it has for the architecture (Hsu et al. 2024,
    arXiv 2410.10989)."""

    optimizer: Optimizer = "adamw_fused"
    """AdamW of torch, fused or not, or of bitsandbytes with paged state."""
    learning_rate: float = 2e-4
    """Highest learning rate of the schedule."""
    schedule: Schedule = "constant"
    """How the learning rate goes after its rise."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate rises from zero; not the harness's warm-up."""
    weight_decay: float = 0.0
    """Of AdamW, on the adapter alone."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 leaves them alone."""
    gradient_accumulation: int = 1
    """Batches of one update of the optimizer."""

    merge_adapter: bool = False
    """Answer requests with the adapter merged into the base, which changes nothing of the training before."""
    kv_cache: KeyValueCache = "dynamic"
    """Cache of a request's keys and values: "dynamic" is made anew for each token, one longer, and what it held is
    copied; "static" is made once, of the whole length."""
    copy_head_input: bool = False
    """Hand the output head a copy of what it takes in a request. The hidden states of the last token are a view with
    the strides of the whole prompt, which torch's linear does not fold; on a CPU it then copies the head's weight."""

    command: str = ""
    """A training script in place of all above, as one would start it, but without a shell: `python train.py --r 64`."""
    cwd: str = ""
    """Folder that the command is run in; the working folder if left out."""
    env: dict[str, str] = field(default_factory=dict, hash=False)
    """Variables of the command in addition to those of the environment. They are written into the run."""
    python: str = ""
    """Interpreter in place of the command's `python`; its folder comes first on the command's PATH."""

    def __post_init__(self) -> None:
        label = f"variant {shorten(self.name, 60)!r}" if self.name else "variant"
        limits.check_least(label, self, _LEAST, positive=("lora_alpha", "learning_rate"))
        checks: tuple[tuple[bool, str, str, str], ...] = (
            (self.lora_dropout < 1, "lora_dropout", "a probability below 1 is expected", "Use 0 up to below 1."),
            (self.warmup_ratio < 1, "warmup_ratio", "a share below 1 is expected", "Use 0 up to below 1."),
            (
                not (self.quantization != "none" and self.rewrites_base),
                "init_lora_weights",
                f"this initialisation rewrites the base weights, which {self.quantization} does not allow",
                'Use "default", "gaussian" or "orthogonal", or quantization = "none".',
            ),
            (
                not (self.init_lora_weights == "orthogonal" and self.r % 2),
                "init_lora_weights",
                f"PEFT's orthogonal initialisation needs an even rank and r is {self.r}",
                "Use an even r.",
            ),
            (
                not (self.prepare_for_kbit and self.quantization == "none"),
                "prepare_for_kbit",
                "preparation is for a quantised base and quantization is 'none'",
                "Set quantization, or leave prepare_for_kbit out.",
            ),
            (
                not (self.attention == "flash_attention_2" and self._compute_type() == "float32"),
                "attention",
                "flash-attn takes bfloat16 or float16 only and this variant computes in float32",
                'Set dtype or autocast to "bfloat16".',
            ),
            (
                not (self.attention == "flash_attention_2" and self.dtype == "float32" and self.quantization == "none"),
                "attention",
                "flash-attn takes bfloat16 or float16 only, and requests meet float32 weights without autocast",
                'Set dtype to "bfloat16".',
            ),
        )
        for holds, key, why, remedy in checks:
            if not holds:
                raise UsageError(f"{label}: {key} = {getattr(self, key)!r}: {why}. {remedy}")
        script.check_script(label, self)
        for module in self.target_modules:
            limits.check_word(label, "target_modules", module)
            if not module:
                raise UsageError(f"{label}: target_modules = {list(self.target_modules)}: an empty name. Remove it.")

    def _compute_type(self) -> str:
        return self.autocast or self.dtype

    @property
    def rewrites_base(self) -> bool:
        """Whether the adapter's initialisation changes the base weights."""
        return self.init_lora_weights in ("olora", "pissa")

    @property
    def is_4bit(self) -> bool:
        """Whether the base is stored in 4 bits."""
        return self.quantization in ("nf4", "fp4")

    @property
    def multiplies_float32(self) -> bool:
        """Whether a step has matrix products of float32, to which `tf32` could apply.

        None under an autocast to 16 bits; else those of the base, of an adapter that PEFT keeps in float32, or of the
        head that preparation casts.
        """
        if self.autocast not in (None, "float32"):
            return False
        base = self.compute_dtype if self.is_4bit else self.dtype
        return "float32" in (base, self.adapter_dtype or "float32") or self.prepare_for_kbit

    @property
    def needs_bitsandbytes(self) -> bool:
        """Whether bitsandbytes runs a part of it."""
        return self.quantization != "none" or self.optimizer.startswith("paged")

    @property
    def id(self) -> str:
        """Short content id: equal for equal configurations, on any machine, in any order of keys."""
        content = {key: value for key, value in codec.to_json(self).items() if key != "name"}
        for key in () if self.is_4bit else OF_4BIT:  # fields that are not read must not distinguish two variants
            content.pop(key)
        return hashlib.sha256(codec.dumps(content).encode()).hexdigest()[:12]

    def differences(self, other: Variant) -> tuple[str, ...]:
        """Names of the fields in which two variants differ, except the label."""
        names = (field.name for field in dataclasses.fields(self) if field.name != "name")
        return tuple(name for name in names if getattr(self, name) != getattr(other, name))
