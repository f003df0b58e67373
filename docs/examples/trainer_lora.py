"""LoRA with the Trainer of transformers, evaluated and saved on the way. A small model with random weights."""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

options = argparse.ArgumentParser()
options.add_argument("--r", type=int, default=16)
options.add_argument("--steps", type=int, default=24)
options.add_argument("--hidden", type=int, default=64)
options = options.parse_args()

torch.manual_seed(0)
sizes = {"hidden_size": options.hidden, "intermediate_size": 2 * options.hidden, "vocab_size": 256}
config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
model = get_peft_model(
    LlamaForCausalLM(config), LoraConfig(r=options.r, target_modules="all-linear", task_type="CAUSAL_LM")
)
rows = []
for length in torch.randint(16, 64, (256,)).tolist():
    ids, mask = torch.randint(3, 256, (64,)), torch.ones(64, dtype=torch.long)
    mask[length:] = 0
    rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
arguments = TrainingArguments(
    output_dir="out-trainer",
    max_steps=options.steps,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    eval_strategy="steps",
    eval_steps=12,
    save_strategy="steps",
    save_steps=24,
    logging_steps=6,
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
    disable_tqdm=True,
)
Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8]).train()
