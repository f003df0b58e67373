"""A variant: one configuration to be measured, independent of how it is measured.

It is a fine-tuning that lorameter builds (`LoraVariant` for LoRA in short form, `PeftVariant` for any PEFT method,
`FullVariant` for all weights), or a command that trains (`ScriptVariant`).

The fields have the names of PEFT, transformers and bitsandbytes, so that a variant reads like the code that it
describes. Values that are invalid in themselves are refused here; `feasibility` checks values that depend on the model
or the machine. Where PEFT has no default, the defaults are those of the QLoRA paper (Dettmers et al. 2023, arXiv
2305.14314).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from lorameter.errors import UsageError, require, shorten
from lorameter.measurements.metrics import MEASUREMENTS, Measure
from lorameter.studies import protocol, script
from lorameter.studies.form import AnyVariant, Support
from lorameter.studies.quantization import FIELDS, Quantization, find_quantization

DType = Literal["float32", "bfloat16", "float16"]
ChosenDType = Literal["auto", "float32", "bfloat16", "float16"]
"""A dtype, or "auto": bfloat16 where the machine multiplies it at least as fast as float32, else float32."""
Attention = Literal["sdpa", "flash_attention_2", "eager", "flex_attention"]

ALL_LINEAR = "all-linear"
"""PEFT's name for all linear layers except the output head."""

ADAPTER_FIELDS = frozenset(
    ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "init_lora_weights")
)
"""Fields in which variants on one base may differ: they affect only the adapter, not the base."""
ADAMW = ("adamw", "adamw_fused")
PAGED = ("paged_adamw_32bit", "paged_adamw_8bit")
"""Optimizers with a short name; all others are named by their class or by PEFT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptVariant(AnyVariant):
    """A training script with its command line, started without a shell: `python train.py --r 64`.

    Raises `UsageError` for a command that cannot be started.
    """

    key: ClassVar[str] = "command"
    form: ClassVar[str] = "a command, whose script defines the training"
    executor: ClassVar[str] = "script"
    supports: ClassVar[frozenset[Support]] = frozenset(("own training",))
    method_name: ClassVar[str] = "script"
    name: str = field(default="", compare=False)
    command: str
    """The command line."""
    cwd: str = ""
    """Working folder of the command; default: the current folder."""
    env: dict[str, str] = field(default_factory=dict, hash=False)
    """Environment variables of the command in addition to the inherited ones. They are stored in the run."""
    python: str = ""
    """Interpreter that replaces the command's `python`; its folder comes first on the command's PATH."""

    def __post_init__(self) -> None:
        script.check_script(_label(self.name), self)

    @property
    def summary(self) -> str:
        """The command, and where it runs."""
        settings = [f"cwd {self.cwd}"] if self.cwd else []
        settings += [f"{name}={value}" for name, value in self.env.items()]
        settings += [f"python {self.python}"] if self.python else []
        return " ".join([self.command, *([f"({', '.join(settings)})"] if settings else [])])

    def on_side(self, kind: str, spec: str) -> Self:
        """The command of the side, if the sides are commands."""
        return dataclasses.replace(self, command=spec) if kind == script.SIDE else self

    def check_side(self, kind: str) -> None:
        """Raise `UsageError` if the side would replace the interpreter that the command brings."""
        if kind in ("interpreter", "requirements"):
            script.check_side(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant(AnyVariant):
    """A fine-tuning that lorameter builds: quantisation, attention, optimizer, and the fields of all methods.

    Raises `UsageError` for an invalid value, with the key, the value and a remedy.
    """

    supports: ClassVar[frozenset[Support]] = frozenset(("workload", "built"))
    name: str = field(default="", compare=False)

    dtype: ChosenDType = "bfloat16"
    """Dtype of the base weights that are not quantised; "auto" is bfloat16 where the machine multiplies it at least as
    fast as float32, else float32."""
    quantization: str = "none"
    """Storage format of the base weights: "int8", "nf4" or "fp4" of bitsandbytes, or a format of another package
    (docs/extending.md); "none" leaves them in `dtype`."""
    double_quant: bool = True
    """Also quantise the quantisation constants; only used for nf4 and fp4."""
    compute_dtype: ChosenDType = "bfloat16"
    """Compute dtype of 4-bit layers; only used for nf4 and fp4. "auto" as for `dtype`; bitsandbytes' own default is
    float32."""
    prepare_for_kbit: bool = False
    """Call peft.prepare_model_for_kbit_training, which casts unquantised weights to float32 (norms, embeddings,
    head)."""
    adapter_dtype: DType | None = None
    """Dtype of the adapter weights; None uses PEFT's default, which casts them to float32."""

    attention: Attention = "sdpa"
    """Attention implementation, by its name in transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    autocast: ChosenDType | None = None
    """Autocast dtype of the forward pass; None runs without autocast, and so does "auto" where `dtype` is float32."""
    tf32: bool = False
    """Allow TF32 for float32 matrix products on a GPU."""
    compile: bool = False
    """Compile the model with torch.compile, with separate caches for each trial."""
    liger_kernel: bool = False
    """Patch the base with all Triton kernels that liger-kernel has for the architecture (Hsu et al. 2024, arXiv
    2410.10989)."""

    optimizer: str = "adamw_fused"
    """torch's AdamW, fused or not ("adamw_fused", "adamw"), bitsandbytes' AdamW with paged state ("paged_adamw_32bit",
    "paged_adamw_8bit"), a class of torch.optim ("Adafactor") or bitsandbytes.optim ("bitsandbytes.Lion8bit"), or an
    optimizer of PEFT ("lora+", "lora-fa", "riemannian")."""
    optimizer_args: dict[str, Any] = field(default_factory=dict, hash=False)
    """Further arguments of the optimizer, by its own names: { loraplus_lr_ratio = 16 }."""
    learning_rate: float = 2e-4
    """Highest learning rate of the schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate rises from zero; unrelated to the harness's warm-up."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on the adapter alone."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 disables clipping."""
    gradient_accumulation: int = 1
    """Batches per optimizer update."""

    merge_adapter: bool = False
    """Answer requests with the adapter merged into the base; training is not affected."""
    kv_cache: Literal["dynamic", "static"] = "dynamic"
    """Key/value cache of a request: "dynamic" is reallocated and copied for each token; "static" is allocated once with
    the full length."""
    copy_head_input: bool = False
    """Give the output head a copy of its input in a request. The hidden states of the last token are a view with the
    strides of the whole prompt, which torch's linear does not fold; on a CPU it then copies the head's weight."""

    def __post_init__(self) -> None:
        label = _label(self.name)
        minimum = {"warmup_ratio": 0, "weight_decay": 0, "max_grad_norm": 0, "gradient_accumulation": 1}
        protocol.check_minimum(label, self, minimum, positive=("learning_rate",))
        try:
            stored = self.format
        except UsageError as error:
            raise UsageError(f"{label}: {error}") from None
        _check(
            label,
            self,
            (self.warmup_ratio < 1, "warmup_ratio", "a share below 1 is expected", "Use 0 up to below 1."),
            (
                stored.is_quantised or not self.prepare_for_kbit,
                "prepare_for_kbit",
                "preparation is for a quantised base and quantization is 'none'",
                "Set quantization, or leave prepare_for_kbit out.",
            ),
            (
                not (self.attention == "flash_attention_2" and (self.autocast or self.dtype) == "float32"),
                "attention",
                "flash-attn takes bfloat16 or float16 only and this variant computes in float32",
                'Set dtype or autocast to "bfloat16".',
            ),
            (
                not (self.attention == "flash_attention_2" and self.dtype == "float32" and not stored.is_quantised),
                "attention",
                "flash-attn takes bfloat16 or float16 only, and requests meet float32 weights without autocast",
                'Set dtype to "bfloat16".',
            ),
            (
                not {"lr", "weight_decay"} & self.optimizer_args.keys(),
                "optimizer_args",
                "lr and weight_decay are keys of the variant",
                "Write learning_rate and weight_decay.",
            ),
            (
                stored.merges or not self.merge_adapter,
                "merge_adapter",
                f"no adapter can be merged into {self.quantization} weights",
                "Leave it out.",
            ),
        )

    @property
    def _unread(self) -> tuple[str, ...]:
        unread = [key for key in FIELDS if key not in self.format.fields]
        return (*unread, *(() if self.optimizer_args else ("optimizer_args",)))

    @property
    def format(self) -> Quantization:
        """The declaration of its quantisation."""
        return find_quantization(self.quantization)

    def effective(self, key: str) -> Any:
        """The value of a field of the quantisation; None if the format does not read it."""
        return getattr(self, key) if key in self.format.fields else None

    @property
    def stored_bits(self) -> int:
        """Bits of a stored weight of a linear layer, without quantisation constants."""
        return self.format.bits or (32 if self.dtype == "float32" else 16)

    @property
    def storage(self) -> str:
        """The storage format of the linear layers, in one word."""
        return self.quantization if self.format.is_quantised else self.dtype

    @property
    def storage_checks(self) -> dict[str, Any]:
        """What kernels_check must read from the linear layers that have the adapter, by path."""
        own = {f"base.{key}": getattr(self, key) for key in self.format.fields}
        return {"base.bits": self.stored_bits, "base.quant_type": self.format.quant_type, **own}

    def unquantised(self) -> Self:
        """The variant on a base that is not quantised."""
        return dataclasses.replace(self, quantization="none", prepare_for_kbit=False)

    @property
    def dtypes(self) -> set[str | None]:
        """The dtypes in which a step computes, and "auto"."""
        return {self.dtype, self.autocast, self.base_dtype}

    @property
    def base_dtype(self) -> ChosenDType:
        """The dtype in which the frozen layers compute without autocast."""
        return cast(ChosenDType, self.effective("compute_dtype") or self.dtype)

    @property
    def product_dtype(self) -> DType:
        """The dtype of the products of the frozen layers, which must not be open."""
        return cast(DType, self.effective("compute_dtype") or self.autocast or self.dtype)

    def with_dtype(self, dtype: DType) -> Self:
        """The variant with this dtype in place of "auto"; bfloat16 for flash-attn, which has no float32."""
        dtype = "bfloat16" if self.attention == "flash_attention_2" else dtype
        values = {"dtype": dtype, "compute_dtype": dtype, "autocast": None if dtype == "float32" else dtype}
        open_fields = {key: value for key, value in values.items() if getattr(self, key) == "auto"}
        return dataclasses.replace(self, **open_fields)  # type: ignore[arg-type]

    @property
    def rewrites_base(self) -> bool:
        """Whether the adapter's initialisation changes the base weights in a way that saving it has to undo."""
        return self.setting("init_lora_weights") in ("olora", "pissa")

    @property
    def trains_base(self) -> bool:
        """Whether weights of the base also train."""
        return any(self.setting(key) not in (None, "none") for key in ("bias", "peft.bias"))

    @property
    def multiplies_float32(self) -> bool:
        """Whether a step has float32 matrix products, to which `tf32` could apply.

        With autocast to 16 bits there are none; otherwise those of the base, of an adapter that PEFT keeps in float32,
        or of the head that `prepare_for_kbit` casts.
        """
        if self.autocast not in (None, "float32"):
            return False
        return "float32" in (self.base_dtype, self.adapter_dtype or "float32") or self.prepare_for_kbit

    @property
    def needs_bitsandbytes(self) -> bool:
        """Whether a part of it runs in bitsandbytes."""
        return "bitsandbytes" in self.format.libraries or self.optimizer.startswith(("paged", "bitsandbytes."))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraVariant(Variant):
    """LoRA in its short form."""

    key: ClassVar[str] = ""
    form: ClassVar[str] = "LoRA in its short form, and neither a command nor in the form of PEFT"
    measures: ClassVar[tuple[Measure, ...]] = tuple(MEASUREMENTS)
    method_name: ClassVar[str] = "LORA"
    r: int = 16
    """Rank of the update, LoRA's r (Hu et al. 2021, arXiv 2106.09685)."""
    lora_alpha: float = 16.0
    """Numerator of the scaling alpha / r (alpha / sqrt(r) with `use_rslora`)."""
    lora_dropout: float = 0.0
    """Probability with which each input of the adapter is zeroed in training."""
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Suffixes of module names; ("all-linear",) means all linear layers except the head; () uses PEFT's default."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that train with the adapter, by PEFT's names."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction separately (Liu et al. 2024, arXiv 2402.09353)."""
    init_lora_weights: Literal["default", "gaussian", "olora", "pissa", "orthogonal"] = "default"
    """Initialisation of the adapter, by PEFT's names."""

    def __post_init__(self) -> None:
        label = _label(self.name)
        protocol.check_minimum(label, self, {"r": 1, "lora_dropout": 0}, positive=("lora_alpha",))
        Variant.__post_init__(self)
        _check(
            label,
            self,
            (self.lora_dropout < 1, "lora_dropout", "a probability below 1 is expected", "Use 0 up to below 1."),
            (
                not (self.format.is_quantised and self.rewrites_base),
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
        )
        for module in self.target_modules:
            protocol.check_word(label, "target_modules", module)
            require(module, f"{label}: target_modules = {list(self.target_modules)}: an empty name. Remove it.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftVariant(Variant):
    """Any PEFT method, with its configuration as `save_pretrained` writes it."""

    key: ClassVar[str] = "peft"
    form: ClassVar[str] = "a method of PEFT, whose own fields are written as peft.KEY"
    peft: dict[str, Any] = field(hash=False)
    """PEFT configuration: `{ peft_type = "VERA", r = 256 }`, or the path of an adapter_config.json or of its folder,
    which is read with the study. All arguments of its PEFT class can be set; others have PEFT's defaults."""

    prefix_text: str = ""
    """Text that initialises the keys and values of a prefix (PEFT's `initialize_kv_prefix_from_text`)."""

    def __post_init__(self) -> None:
        require(
            isinstance(self.peft.get("peft_type"), str),
            f'{_label(self.name)}: peft: no peft_type in it. Write peft = {{ peft_type = "LORA", … }}.',
        )
        Variant.__post_init__(self)

    @property
    def method_name(self) -> str:
        """PEFT's name of the method."""
        return str(self.peft["peft_type"])


@dataclass(frozen=True, slots=True, kw_only=True)
class FullVariant(Variant):
    """Full fine-tuning: all weights of the model train, in their stored dtype."""

    key: ClassVar[str] = "method"
    form: ClassVar[str] = "full fine-tuning, which has no adapter"
    method_name: ClassVar[str] = "full fine-tuning"
    method: Literal["full"]
    """"full" trains all weights; for a PEFT method use `peft`."""

    def __post_init__(self) -> None:
        Variant.__post_init__(self)
        own = "there is no adapter, the weights of the model train"
        _check(
            _label(self.name),
            self,
            (
                not self.format.is_quantised,
                "quantization",
                "quantised weights do not train",
                'Use quantization = "none".',
            ),
            (self.adapter_dtype is None, "adapter_dtype", own, "Set dtype in place of it."),
            (not self.merge_adapter, "merge_adapter", own, "Leave it out."),
        )

    @property
    def trains_base(self) -> bool:
        """Always true."""
        return True


if TYPE_CHECKING:
    BuiltVariant = Variant
else:
    BuiltVariant = AnyVariant
"""A `Variant` as a field of a message or a document; its form determines the class (`AnyVariant.class_for`)."""


def _label(name: str) -> str:
    return f"variant {shorten(name, 60)!r}" if name else "variant"


def _check(label: str, variant: AnyVariant, *checks: tuple[bool, str, str, str]) -> None:
    """Raise `UsageError` for the first check that does not hold; a check has a condition, the key, the reason, and a
    remedy."""
    for holds, key, why, remedy in checks:
        require(holds, f"{label}: {key} = {getattr(variant, key)!r}: {why}. {remedy}")
