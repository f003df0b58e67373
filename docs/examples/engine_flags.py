"""A small LoRA training with two options that switch an engine on."""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

options = argparse.ArgumentParser()
options.add_argument("--gradient_checkpointing", action="store_true")
options.add_argument("--optim", default="adamw_torch")
options = options.parse_args()

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
model.enable_input_require_grads()
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 256, (256, 64))]
arguments = TrainingArguments(
    output_dir="out",
    max_steps=1000,
    per_device_train_batch_size=4,
    optim=options.optim,
    gradient_checkpointing=options.gradient_checkpointing,
    use_cpu=True,
)
Trainer(model, arguments, train_dataset=rows).train()
