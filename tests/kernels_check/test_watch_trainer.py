"""Tests of ``watch`` in callbacks of real trainers: it is opened in one callback and closed in another."""

from contextlib import ExitStack

import peft
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import kernels_check

WANTED = {
    **{"attention.backend": "flash", "attention.mask": "causal", "base.frozen": True, "peft.attached": True},
    **{"peft.learning": True, "optimizer.class": "torch.optim.AdamW", "checkpointing": True, "mode": "train"},
}
ROWS = [{"input_ids": row, "labels": row.clone()} for row in torch.randint(3, 96, (12, 16))]


def _adapted():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0))
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)


class Look(TrainerCallback):
    """Watches each step from its first micro-batch to its update."""

    def __init__(self, model):
        self.watched = None if model is None else kernels_check.watch(model, WANTED)
        self.open = ExitStack()
        self.found = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.open.enter_context(self.watched)

    def on_step_end(self, args, state, control, **kwargs):
        self.open.close()
        self.found.append({check.path: check for check in self.watched.checks})


def _trainer(tmp_path, model, callbacks, **options):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        seed=7,
    )
    return Trainer(model=model, args=arguments, train_dataset=ROWS, callbacks=callbacks, **options)


def _hooks(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def _losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_trainer_trains_as_if_never_watched_and_its_steps_are_judged(tmp_path):
    """Losses and weights are bit-equal; from the second step on every requirement is met, before that all but
    learning."""
    plain, model = _adapted(), _adapted()
    unwatched = _trainer(tmp_path, plain, [])
    unwatched.train()
    look = Look(model)
    trainer = _trainer(tmp_path, model, [look])
    trainer.train()
    assert _losses(trainer) == _losses(unwatched)
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
    assert len(look.found) == 3
    unmet = [{path for path in WANTED if not found[path].met} for found in look.found]
    assert unmet == [{"peft.learning"}, set(), set()], [found["peft.learning"].reason for found in look.found]
    assert _hooks(model) == _hooks(plain)


@pytest.mark.filterwarnings("ignore")
def test_the_default_loss_of_trl_is_decided(tmp_path):
    """TRL's trainer computes the loss from log-probabilities of the model, and packs rows without a mask."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="</s>"
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2))
    look = Look(None)

    def begin(args, state, control, model, **kwargs):
        look.watched = kernels_check.watch(model, {"loss.tokens": True, "packing.isolated": True})

    look.on_train_begin = begin
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "report_to": []}
    rows = [{"input_ids": torch.randint(3, 96, (length,)).tolist()} for length in (5, 9, 14, 7, 11, 6, 13, 8) * 4]
    trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, packing=True, max_length=48, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        callbacks=[look],
    ).train()
    checks = look.found[-1]
    assert [checks[path].status for path in ("loss.tokens", "packing.isolated")] == ["active", "active"], checks
