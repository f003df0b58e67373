"""Healthy steps: other models, other optimizers and other passes inside of them, and bases of other shapes."""

from __future__ import annotations

import copy
from typing import Any

import peft
import peft.optimizers
import torch
from healthy import (
    LENGTH,
    PLAIN,
    RATE,
    ROWS,
    RUNNING,
    WORDS,
    Twin,
    adapted,
    llama,
    plain,
    stepping,
    trained,
    twin,
    words,
)
from torch import nn
from torch.nn import functional


@twin("optimizer: is given the frozen parameters, too")
def _everything() -> Twin:
    model = adapted(llama())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    return Twin(model=model, step=stepping(model, optimizer), required=PLAIN)


@twin("optimizer: LoRA-FA of PEFT")
def _lorafa() -> Twin:
    model = adapted(llama(), lora_dropout=0.0)
    optimizer = peft.optimizers.create_lorafa_optimizer(model=model, r=4, lora_alpha=8, lr=RATE)
    required = {path: value for path, value in PLAIN.items() if not path.startswith("optimizer.")}
    return Twin(model=model, step=stepping(model, optimizer), required=required)


@twin("optimizer: LoRA+ of PEFT")
def _loraplus() -> Twin:
    model = adapted(llama())
    optimizer = peft.optimizers.create_loraplus_optimizer(
        model=model, optimizer_cls=torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16
    )
    return Twin(model=model, step=stepping(model, optimizer), required=PLAIN)


@twin("optimizer: fused")
def _fused() -> Twin:
    return plain(make=lambda given: torch.optim.AdamW(given, lr=RATE, fused=True), **{"optimizer.fused": True})


@twin("optimizer: two, of one class")
def _two() -> Twin:
    model = adapted(llama())
    every = trained(model)
    optimizers = [torch.optim.AdamW(every[::2], lr=RATE), torch.optim.AdamW(every[1::2], lr=RATE)]
    ids = words()

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return Twin(model=model, step=step, required=PLAIN)


@twin("optimizer: steps with a closure, as Lightning's does")
def _closure() -> Twin:
    model = adapted(llama())
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    ids = words()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    return Twin(model=model, step=lambda: optimizer.step(closure), required=PLAIN)


@twin("optimizer: warms up from a rate of 0, fresh adapter")
def _warm() -> Twin:
    model = adapted(llama())
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, done / 10))
    inner = stepping(model, optimizer)
    return Twin(model=model, step=lambda: (inner(), schedule.step()), required=PLAIN)


@twin("optimizer: gradients scaled, clipped and accumulated")
def _scaled() -> Twin:
    model = adapted(llama())
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    scaler, ids = torch.amp.GradScaler("cpu"), words()

    def step() -> None:
        for row in ids.split(1):
            scaler.scale(model(input_ids=row, labels=row).loss / ROWS).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return Twin(model=model, step=step, required=PLAIN)


@twin("in the step: an evaluation")
def _evaluates() -> Twin:
    run = plain()
    ids = words()

    def step() -> None:
        run.step()
        run.model.eval()
        with torch.no_grad():
            run.model(input_ids=ids)
        run.model.train()

    return Twin(model=run.model, step=step, required=run.required)


@twin("in the step: an answer is generated first")
def _generates() -> Twin:
    run = plain()
    ids = words()

    def step() -> None:
        run.model.eval()
        run.model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        run.model.train()
        run.step()

    return Twin(model=run.model, step=step, required=run.required)


@twin("in the step: a teacher of another depth, eager")
def _teacher() -> Twin:
    model, teacher = adapted(llama()), llama(5)
    teacher.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    ids = words()

    def step() -> None:
        optimizer.zero_grad()
        with torch.no_grad():
            taught = teacher.eval()(input_ids=ids).logits
        found = model(input_ids=ids, labels=ids)
        (found.loss + functional.mse_loss(found.logits, taught)).backward()
        optimizer.step()

    return Twin(model=model, step=step, required=PLAIN)


@twin("in the step: a running average of the model")
def _average() -> Twin:
    run = plain()
    average = copy.deepcopy(run.model).requires_grad_(False)

    def step() -> None:
        run.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), run.model.parameters(), strict=True):
                mean.lerp_(value, 0.1)
            average(input_ids=words())

    return Twin(model=run.model, step=step, required=run.required)


@twin("in the step: preference against the model without its adapter")
def _preference() -> Twin:
    model = adapted(llama())
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    ids = words()

    def score() -> Any:
        logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, ids[:, 1:, None]).sum((1, 2))

    def step() -> None:
        optimizer.zero_grad()
        with torch.no_grad(), model.disable_adapter():
            reference = score()
        chosen, rejected = score() - reference
        (-functional.logsigmoid(0.1 * (chosen - rejected))).backward()
        optimizer.step()

    return Twin(model=model, step=step, required=PLAIN)


@twin("base: its biases train with the adapter, as PEFT was asked to")
def _biases() -> Twin:
    model = adapted(llama(attention_bias=True, mlp_bias=True), bias="all")
    return plain(model, make=lambda given: torch.optim.AdamW(given, lr=RATE, fused=True), **{"optimizer.fused": True})


@twin("base: biases of its 4-bit layers train with the adapter")
def _biases_of_layers() -> Twin:
    base = llama(quant="nf4", dtype=torch.bfloat16)
    for layer in base.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            linear.bias = nn.Parameter(torch.zeros(linear.out_features), requires_grad=False)
    return plain(adapted(base, bias="lora_only"), **{"base.bits": 4, "base.quant_type": "nf4"})


@twin("base: pruned, its configuration says more layers")
def _pruned() -> Twin:
    model = llama(4)
    model.model.layers = model.model.layers[:2]
    return plain(adapted(model))


@twin("base: held in a module of one's own, by a name with lora in it")
def _held() -> Twin:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_model = adapted(llama())

        def forward(self, **inputs: Any) -> Any:
            return self.lora_model(**inputs)

    return plain(Mine().train())


@twin("base: padded rows")
def _padded() -> Twin:
    run = plain()
    ids, mask = words(), torch.ones(ROWS, LENGTH, dtype=torch.long)
    ids[0, -3:], mask[0, -3:] = 0, 0
    step = stepping(run.model, torch.optim.AdamW(trained(run.model), lr=RATE), input_ids=ids, attention_mask=mask,
                    labels=ids.masked_fill(mask == 0, -100))  # fmt: skip
    told = {"attention.mask": "explicit", "padding.share": 3 / (ROWS * LENGTH)}
    return Twin(model=run.model, step=step, required={**run.required, **told})


@twin("base: records packed into a row")
def _packed() -> Twin:
    run = plain()
    ids = words()
    places = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(ROWS, -1)
    batch = {"input_ids": ids, "position_ids": places, "use_cache": False}
    step = stepping(run.model, torch.optim.AdamW(trained(run.model), lr=RATE), **batch, labels=ids)
    told = {"attention.mask": "explicit", "packing.isolated": True}
    return Twin(model=run.model, step=step, batch=batch, required={**run.required, **told})


@twin("base: an encoder and a decoder")
def _encoder_decoder() -> Twin:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(3)
    model = BartForConditionalGeneration(BartConfig(
        vocab_size=WORDS, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
    ))  # fmt: skip
    model = adapted(model, target_modules=["q_proj", "v_proj", "fc1"], task_type="SEQ_2_SEQ_LM")
    return plain(model)


@twin("base: a vision tower before the language model")
def _tower() -> Twin:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=WORDS - 1, vision_feature_layer=-1)
    )
    model = adapted(model, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    ids = words().clamp(max=WORDS - 2)
    ids[:, 1:5] = WORDS - 1
    pixels = torch.randn(ROWS, 3, 16, 16)
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    step = stepping(model, optimizer, input_ids=ids, pixel_values=pixels, labels=ids)
    return Twin(model=model, step=step, required=PLAIN)


@twin("base: experts, adapted by target_parameters")
def _experts() -> Twin:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2, max_position_embeddings=64,
    ))  # fmt: skip
    model = adapted(
        model, target_modules=["q_proj"], lora_dropout=0.0,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    return plain(model)


@twin("base: nn.MultiheadAttention is adapted")
def _multihead() -> Twin:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
            self.dense = nn.Linear(32, 32)

        def forward(self, hidden: Any) -> Any:
            return self.dense(self.attention(hidden, hidden, hidden, need_weights=False)[0]) + hidden

    torch.manual_seed(3)
    body = nn.Sequential(nn.Embedding(WORDS, 32), Layer(), Layer())
    model = peft.get_peft_model(body, peft.LoraConfig(r=4, target_modules=["attention", "dense"])).train()
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        model(words()).pow(2).mean().backward()
        optimizer.step()

    return Twin(model=model, step=step, required=RUNNING | {"attention.backend": "flash", "mode": "train"})
