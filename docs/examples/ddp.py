"""Watches the first and the last step of two ranks, between which they do not exchange gradients."""

import peft
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import kernels_check

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes, max_position_embeddings=64, pad_token_id=0))
model = peft.get_peft_model(model, peft.LoraConfig(lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
ddp = DistributedDataParallel(model)
optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
watched = kernels_check.watch(model, {f"ranks.{what}": True for what in ("base", "adapters", "gradients", "steps")})


def step() -> None:
    """One update."""
    ids = torch.randint(3, 96, (2, 16))
    ddp(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


torch.manual_seed(rank)
with watched:
    step()
for check in watched.checks:
    if rank == 0 and check.path.startswith("ranks."):
        print(check.path, check.status)
for _ in range(10):  # ten steps without an exchange, which is the mistake to be found
    with ddp.no_sync():
        step()
with watched:
    step()
for check in watched.checks:
    if rank == 0 and check.path.startswith("ranks."):
        print(check.path, check.status)
