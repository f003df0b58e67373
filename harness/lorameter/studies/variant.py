"""A variant: one configuration to be measured, and nothing about how it is measured.

It is a fine-tuning that lorameter builds, with LoRA in short form (`LoraVariant`), with any method of PEFT
(`PeftVariant`) or of all weights (`FullVariant`), or a command that trains (`ScriptVariant`).

The fields carry the names that PEFT, transformers and bitsandbytes give them, so that a variant reads like the
code that it describes. What can be judged from the values alone is refused here; what depends on the model or the
machine is judged in `feasibility`. Defaults are those of the QLoRA paper's recipe (Dettmers et al. 2023, arXiv
2305.14314) where PEFT itself has no opinion.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorameter.errors import UsageError, shorten
from lorameter.records import codec
from lorameter.studies import limits, script

DType = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "nf4", "fp4"]
Attention = Literal["sdpa", "flash_attention_2", "eager", "flex_attention"]
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
ADAMW = ("adamw", "adamw_fused")
PAGED = ("paged_adamw_32bit", "paged_adamw_8bit")
"""Optimizers that have a short name; every other one is named by its class or by PEFT."""


class AnyVariant(abc.ABC):
    """One configuration to be measured; the group key of every result.

    `name` is a label and no part of the identity: two variants that differ in name only are the same variant.
    """

    __slots__ = ()
    name: str

    @property
    @abc.abstractmethod
    def method_name(self) -> str:
        """The method, by PEFT's name where it has one."""

    @staticmethod
    def class_for(table: Mapping[str, Any]) -> type[AnyVariant]:
        """The class of the variant that a table of a study, a record or a message describes."""
        if table.get("command"):
            return ScriptVariant
        if "peft" in table:
            return PeftVariant
        return FullVariant if "method" in table else LoraVariant

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that two variants may differ in, by name; the keys of a PEFT configuration are `peft.KEY`."""
        own = {key: getattr(self, key) for key in form_keys(type(self)) if key != "name"}
        return own | {f"peft.{key}": value for key, value in own.pop("peft", {}).items()}

    def setting(self, key: str) -> Any:
        """The value of one of the settings, or of "method"; None where this form has none."""
        return self.method_name if key == "method" else self.settings.get(key)

    @property
    def id(self) -> str:
        """Short content id: equal for equal configurations, on any machine, in any order of keys."""
        content = {
            key: value for key, value in codec.to_json(self).items() if key != "name" and key not in self._unread
        }
        return hashlib.sha256(codec.dumps(content).encode()).hexdigest()[:12]

    @property
    def _unread(self) -> tuple[str, ...]:
        """Fields that have no effect, which must not distinguish two variants."""
        return ()

    def differences(self, other: AnyVariant) -> tuple[str, ...]:
        """Names of the settings in which two variants differ; of two methods "method", and what both have."""
        ours, theirs = self.settings, other.settings
        if type(self) is not type(other):
            own = tuple(key for key in ours if key in theirs and ours[key] != theirs[key])
            return ("method", *(key for key in own if key != "method"))
        missing = object()
        return tuple(key for key in {**ours, **theirs} if ours.get(key, missing) != theirs.get(key, missing))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptVariant(AnyVariant):
    """A training script, as one would start it, but without a shell: `python train.py --r 64`.

    Raises `UsageError` for a command that cannot be started.
    """

    method_name: ClassVar[str] = "script"
    name: str = field(default="", compare=False)
    command: str
    """The command line."""
    cwd: str = ""
    """Folder that the command is run in; the working folder if left out."""
    env: dict[str, str] = field(default_factory=dict, hash=False)
    """Variables of the command in addition to those of the environment. They are written into the run."""
    python: str = ""
    """Interpreter in place of the command's `python`; its folder comes first on the command's PATH."""

    def __post_init__(self) -> None:
        script.check_script(_label(self.name), self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant(AnyVariant):
    """A fine-tuning that lorameter builds: quantisation, attention, optimizer, and what all methods have.

    Raises `UsageError` for a value that no machine could run, naming the key, the value and the remedy.
    """

    name: str = field(default="", compare=False)

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

    optimizer: str = "adamw_fused"
    """AdamW of torch, fused or not ("adamw_fused", "adamw"), or of bitsandbytes with paged state ("paged_adamw_32bit",
    "paged_adamw_8bit"); else a class of torch.optim ("Adafactor") or of bitsandbytes.optim ("bitsandbytes.Lion8bit"),
    or one of PEFT's ("lora+", "lora-fa", "riemannian")."""
    optimizer_args: dict[str, Any] = field(default_factory=dict, hash=False)
    """Further arguments of the optimizer, by their names there: { loraplus_lr_ratio = 16 }."""
    learning_rate: float = 2e-4
    """Highest learning rate of the schedule."""
    schedule: Schedule = "constant"
    """How the learning rate goes after its rise."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate rises from zero; not the harness's warm-up."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on the adapter alone."""
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

    LEAST: ClassVar[Mapping[str, float]] = {
        "warmup_ratio": 0, "weight_decay": 0, "max_grad_norm": 0, "gradient_accumulation": 1,
    }  # fmt: skip

    def __post_init__(self) -> None:
        label = _label(self.name)
        limits.check_least(label, self, self.LEAST, positive=("learning_rate",))
        _check(
            label,
            self,
            (self.warmup_ratio < 1, "warmup_ratio", "a share below 1 is expected", "Use 0 up to below 1."),
            (
                not (self.prepare_for_kbit and self.quantization == "none"),
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
                not (self.attention == "flash_attention_2" and self.dtype == "float32" and self.quantization == "none"),
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
        )

    @property
    def _unread(self) -> tuple[str, ...]:
        return (*(() if self.is_4bit else OF_4BIT), *(() if self.optimizer_args else ("optimizer_args",)))

    @property
    def rewrites_base(self) -> bool:
        """Whether the adapter's initialisation changes the base weights in a way that saving it has to undo."""
        return False

    @property
    def trains_base(self) -> bool:
        """Whether weights of the base train too."""
        return False

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
        return self.quantization != "none" or self.optimizer.startswith(("paged", "bitsandbytes."))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraVariant(Variant):
    """LoRA in its short form."""

    method_name: ClassVar[str] = "LORA"
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

    def __post_init__(self) -> None:
        label = _label(self.name)
        limits.check_least(label, self, {"r": 1, "lora_dropout": 0}, positive=("lora_alpha",))
        _check(
            label,
            self,
            (self.lora_dropout < 1, "lora_dropout", "a probability below 1 is expected", "Use 0 up to below 1."),
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
        )
        Variant.__post_init__(self)
        for module in self.target_modules:
            limits.check_word(label, "target_modules", module)
            if not module:
                raise UsageError(f"{label}: target_modules = {list(self.target_modules)}: an empty name. Remove it.")

    @property
    def rewrites_base(self) -> bool:
        """Whether the adapter's initialisation changes the base weights in a way that saving it has to undo."""
        return self.init_lora_weights in ("olora", "pissa")

    @property
    def trains_base(self) -> bool:
        """Whether biases of the base train too."""
        return self.bias != "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftVariant(Variant):
    """Any method of PEFT, with its configuration as `save_pretrained` writes it."""

    peft: dict[str, Any] = field(hash=False)
    """Configuration of PEFT: `{ peft_type = "VERA", r = 256 }`, or the path of an adapter_config.json or of its folder,
    which is read when the study is. What its class in PEFT takes can be set; what is left out has PEFT's default."""

    prefix_text: str = ""
    """Text whose keys and values a prefix begins with (PEFT's `initialize_kv_prefix_from_text`)."""

    def __post_init__(self) -> None:
        label = _label(self.name)
        if not isinstance(self.peft.get("peft_type"), str):
            raise UsageError(f'{label}: peft: no peft_type in it. Write peft = {{ peft_type = "LORA", … }}.')
        Variant.__post_init__(self)

    @property
    def method_name(self) -> str:
        """PEFT's name for what trains."""
        return str(self.peft["peft_type"])

    @property
    def trains_base(self) -> bool:
        """Whether biases of the base train too."""
        return bool(self.peft.get("bias", "none") != "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class FullVariant(Variant):
    """Full fine-tuning: all weights of the model train, in the type that they are stored in."""

    method_name: ClassVar[str] = "full fine-tuning"
    method: Literal["full"]
    """"full" trains all weights; a method of PEFT is named in `peft`."""

    def __post_init__(self) -> None:
        Variant.__post_init__(self)
        own = "there is no adapter, the weights of the model train"
        _check(
            _label(self.name),
            self,
            (
                self.quantization == "none",
                "quantization",
                "quantised weights do not train",
                'Use quantization = "none".',
            ),
            (self.adapter_dtype is None, "adapter_dtype", own, "Set dtype in place of it."),
            (not self.merge_adapter, "merge_adapter", own, "Leave it out."),
        )

    @property
    def trains_base(self) -> bool:
        """All of it."""
        return True


FORMS: tuple[type[AnyVariant], ...] = (LoraVariant, ScriptVariant, PeftVariant, FullVariant)
if TYPE_CHECKING:
    BuiltVariant = Variant
else:
    BuiltVariant = AnyVariant
"""A `Variant` as a field of a message or a document: it is decoded by its form (`AnyVariant.class_for`)."""


def form_keys(form: type[AnyVariant]) -> tuple[str, ...]:
    """Keys of a variant of one form: its name, what this form alone has, and what it has from `Variant`."""
    every = [one.name for one in dataclasses.fields(form)]  # type: ignore[arg-type]
    return tuple(sorted(every, key=lambda key: (key != "name", key not in form.__annotations__)))


KEYS = tuple(dict.fromkeys(key for form in FORMS for key in form_keys(form)))
"""Keys of a variant of any form."""


def _label(name: str) -> str:
    return f"variant {shorten(name, 60)!r}" if name else "variant"


def _check(label: str, variant: AnyVariant, *checks: tuple[bool, str, str, str]) -> None:
    """Raises `UsageError` for the first check that does not hold: whether it holds, the key, why not, and a remedy."""
    for holds, key, why, remedy in checks:
        if not holds:
            raise UsageError(f"{label}: {key} = {getattr(variant, key)!r}: {why}. {remedy}")
