"""Healthy steps of other people's loops: Trainer, Accelerate, TRL, Lightning; a step as it happens inside of them."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from healthy import LENGTH, PLAIN, RATE, ROWS, RUNNING, WORDS, SkippedError, Twin, adapted, llama, trained, twin, words
from torch import nn

WRAPPED = {path: value for path, value in PLAIN.items() if path != "optimizer.class"}
"""Whoever wraps an optimizer may show the class of the wrapper."""


def needs(package: str) -> None:
    """Skip a twin where a package is missing.

    Raises:
        SkippedError: it is.
    """
    if importlib.util.find_spec(package) is None:
        raise SkippedError(f"{package} is not installed (pip install 'lorameter[proof]')")


def _rows() -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for row in torch.randint(3, WORDS, (4 * ROWS, LENGTH))]


def _in_training(trainer: Any, batches: list[Any]) -> Callable[[], None]:
    """The step of a Trainer after ``train()`` has set it up: passes, clipping, update, as its inner loop has them."""
    trainer.current_gradient_accumulation_steps = len(batches)
    accelerator, model = trainer.accelerator, trainer.model_wrapped

    def step() -> None:
        model.train()
        for place, batch in enumerate(batches):
            accelerator.gradient_state._set_sync_gradients(place == len(batches) - 1)
            trainer.training_step(model, dict(batch))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()

    return step


def _arguments(kind: Any, **options: Any) -> Any:
    return kind(
        output_dir=tempfile.gettempdir(), max_steps=1, per_device_train_batch_size=ROWS, learning_rate=RATE,
        report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip


def _trainer(accumulate: int = 1, **options: Any) -> Twin:
    from transformers import Trainer, TrainingArguments

    model = adapted(llama())
    arguments = _arguments(
        TrainingArguments, gradient_accumulation_steps=accumulate, lr_scheduler_type="constant", optim="adamw_torch",
        **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=_rows())
    trainer.train()
    loader = iter(trainer.get_train_dataloader())
    step = _in_training(trainer, [next(loader) for _ in range(accumulate)])
    return Twin(model=trainer.model, step=step, required=WRAPPED)


@twin("loop: Trainer of transformers")
def _plain_trainer() -> Twin:
    return _trainer()


@twin("loop: Trainer of transformers, accumulating")
def _accumulating_trainer() -> Twin:
    return _trainer(2)


@twin("loop: Trainer of transformers, recomputing")
def _recomputing_trainer() -> Twin:
    run = _trainer(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    return Twin(model=run.model, step=run.step, required={**run.required, "checkpointing": True})


@twin("loop: Trainer of transformers, autocast")
def _autocast_trainer() -> Twin:
    run = _trainer(bf16=True)
    told = {"attention.dtype": "bfloat16", "base.compute_dtype": "bfloat16"}
    return Twin(model=run.model, step=run.step, required={**run.required, **told})


@twin("loop: Accelerate, accumulating")
def _accelerate() -> Twin:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = adapted(llama())
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = words()

    def step() -> None:
        for row in ids.split(1):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=row, labels=row).loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return Twin(model=model, step=step, required=WRAPPED)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{place}": place for place in range(3, WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@twin("loop: SFTTrainer of TRL")
def _sft() -> Twin:
    needs("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    said = [{"text": " ".join(f"w{word}" for word in row)} for row in torch.randint(3, WORDS, (8, LENGTH)).tolist()]
    arguments = _arguments(
        SFTConfig, lr_scheduler_type="constant", bf16=False, max_length=LENGTH, gradient_checkpointing=False,
        optim="adamw_torch",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=adapted(llama()), args=arguments, train_dataset=Dataset.from_list(said), processing_class=_tokenizer()
    )
    trainer.train()
    step = _in_training(trainer, [next(iter(trainer.get_train_dataloader()))])
    return Twin(model=trainer.model, step=step, required=WRAPPED)


@twin("loop: DPOTrainer of TRL, its reference the model without the adapter")
def _dpo() -> Twin:
    needs("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def words_of(length: int) -> str:
        return " ".join(f"w{word}" for word in torch.randint(3, WORDS, (length,)).tolist())

    pairs = [{"prompt": words_of(4), "chosen": " " + words_of(6), "rejected": " " + words_of(6)} for _ in range(8)]
    arguments = _arguments(
        DPOConfig, lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False, optim="adamw_torch"
    )
    model = adapted(llama(), lora_dropout=0.0)
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=_tokenizer()
    )
    trainer.train()
    step = _in_training(trainer, [next(iter(trainer.get_train_dataloader()))])
    return Twin(model=trainer.model, step=step, required=WRAPPED)


@twin("loop: automatic optimization of Lightning, which steps with a closure")
def _lightning() -> Twin:
    needs("lightning")
    import lightning

    model = adapted(llama())

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def training_step(self, batch: Any, place: int) -> Any:
            return self.inner(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(trained(self), lr=RATE)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, barebones=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(words(), batch_size=ROWS))
    loop, ids = trainer.fit_loop.epoch_loop, words()
    module.train()

    def step() -> None:
        trainer.training = True
        options = {"batch": ids, "batch_idx": 0}
        loop.automatic_optimization.run(trainer.optimizers[0], 0, options)

    return Twin(model=module, step=step, required=WRAPPED)


@twin("loop: Fabric of Lightning")
def _fabric() -> Twin:
    needs("lightning")
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = adapted(llama())
    model, optimizer = fabric.setup(model, torch.optim.AdamW(trained(model), lr=RATE))
    ids = words()

    def step() -> None:
        optimizer.zero_grad()
        fabric.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()

    return Twin(model=model, step=step, required=WRAPPED)


@twin("base: stored by torchao in 8 bits")
def _torchao() -> Twin:
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama()
    quantize_(
        model, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name
    )
    model = adapted(model)
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    ids = words()

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return Twin(model=model, step=step, required=RUNNING | {"mode": "train", "attention.backend": "flash"})
