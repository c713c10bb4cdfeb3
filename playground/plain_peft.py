"""Four text tasks share one MixLoRA adapter: plain PEFT and transformers' own Trainer, under a minute on two CPU cores.

"copy 471>" wants 471, "flip 471>" 174, "sort 471>" 147, "next 471>" 582: tasks that pull an adapter different ways. The
base model is random and a byte is a token, so nothing is downloaded: `python -m playground.plain_peft`.
"""

import argparse
import copy

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from llava_mixlora import MixLoraConfig
from playground import PLAYGROUND

LAYER = "model.layers.1.mlp.down_proj"  # whose routes are shown
TASKS = {
    "copy": lambda digits: digits,
    "flip": lambda digits: digits[::-1],
    "sort": lambda digits: "".join(sorted(digits)),
    "next": lambda digits: "".join(str((int(digit) + 1) % 10) for digit in digits),
}

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--steps", type=int, default=500, help="of training, at least 1 (default: %(default)s)")
parser.add_argument("--output", default=str(PLAYGROUND / "output" / "plain-peft"), help="the adapter's folder")
arguments = parser.parse_args()
if arguments.steps < 1:
    parser.error(f"--steps={arguments.steps}: expected at least 1")

numbers = [f"{number:03}" for number in range(1000)]
heldout, data = numbers[::7], []
for task, digits in ((task, digits) for task in TASKS for digits in numbers if digits not in heldout):
    prompt, answer = list(f"{task} {digits}>".encode()), list(TASKS[task](digits).encode())
    # -100 marks the prompt: routes are made from it, and only the answer is learnt.
    data.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})

torch.set_num_threads(1)  # more of them cost a tiny model more than they gain
set_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1, pad_token_id=0))
same_base = copy.deepcopy(base)  # get_peft_model changes the model that it is given
learnt = ["embed_tokens", "lm_head"]  # in full, since the base is random
config = MixLoraConfig(lora_alpha=8, target_modules="all-linear", modules_to_save=learnt, task_type="CAUSAL_LM")
model = get_peft_model(base, config)
pace = {"max_steps": arguments.steps, "per_device_train_batch_size": 32, "learning_rate": 8e-3, "logging_steps": 100}
settings = TrainingArguments(arguments.output, **pace, save_strategy="no", report_to="none", use_cpu=True)
Trainer(model, settings, train_dataset=data).train()
model.eval().save_pretrained(arguments.output)

loaded = PeftModel.from_pretrained(same_base, arguments.output)
print(f"held-out accuracy, and how many of {len(heldout)} prompts chose each A factor of {LAYER}:")
for task, right in TASKS.items():
    prompts = torch.tensor([list(f"{task} {digits}>".encode()) for digits in heldout])
    answers = [bytes(row[-3:]).decode() for row in loaded.generate(input_ids=prompts, max_new_tokens=3).tolist()]
    accuracy = sum(given == right(digits) for given, digits in zip(answers, heldout)) / len(heldout)
    chosen = loaded.base_model.routes()[LAYER].index_A.flatten().bincount(minlength=config.num_factors)
    print(f"{task} {accuracy:.1%} {chosen.tolist()}")
print("logits equal after loading:", torch.equal(model(prompts).logits, loaded(prompts).logits))
