"""QLoRA with TRL: a model in NF4, an adapter on all linear layers, records of instructions and responses."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

options = argparse.ArgumentParser()
options.add_argument("--model", required=True)
options.add_argument("--data", required=True, help="JSON lines with `instruction` and `response`")
options.add_argument("--steps", type=int, default=30)
options.add_argument("--r", type=int, default=16)
options.add_argument("--bits", type=int, default=4, choices=(4, 16))
options = options.parse_args()

in_4_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(
    options.model, dtype=torch.bfloat16, quantization_config=in_4_bits if options.bits == 4 else None
)
tokenizer = AutoTokenizer.from_pretrained(options.model)
records = load_dataset("json", data_files=options.data, split="train").select(range(256))
records = records.map(
    lambda record: {"prompt": record["instruction"] + "\n", "completion": record["response"]},
    remove_columns=records.column_names,
)
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=records,
    peft_config=LoraConfig(r=options.r, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    args=SFTConfig(
        output_dir="out-sft",
        max_length=128,
        per_device_train_batch_size=1,
        max_steps=options.steps,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    ),
)
trainer.train()
