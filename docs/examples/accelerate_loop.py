"""LoRA in a loop of one's own with Accelerate, gradients accumulated over two batches."""

import argparse

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

options = argparse.ArgumentParser()
options.add_argument("--steps", type=int, default=24)
options = options.parse_args()

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 128}
model = get_peft_model(
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)),
    LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
rows = torch.randint(3, 256, (4 * options.steps, 64))
loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=2)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-3), loader)
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
accelerator.print(f"last loss {loss.item():.4f}")
