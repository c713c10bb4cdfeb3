"""LLaVA-NeXT itself, with a Llama and with a Qwen2: trained, resumed, loaded, asked, merged."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ..conftest import LLAMA
from ..end_to_end.training import ALONE, PLUGIN, environment, train
from ..tiny import VOCABULARY, draw_pictures


def is_next():
    """Whether the LLaVA that is found first is told what kind of input each sample is."""
    found = importlib.util.find_spec("llava")
    return (
        found is not None
        and "modalities" in Path(found.origin).with_name("model").joinpath("llava_arch.py").read_text()
    )


pytestmark = pytest.mark.skipif(not is_next(), reason="the LLaVA that is installed is not LLaVA-NeXT")
QUESTIONS = ["what color is the shape?", "is the circle red or blue?", "name the shape.", "red or blue?"]
STEPS = 12
FLAGS = [
    *("--mixlora_enable=True", "--mixlora_num_factors=4", "--attn_implementation=eager", "--learning_rate=0.03"),
    *("--lr_scheduler_type=constant", "--per_device_train_batch_size=4", "--optim=adamw_torch", "--logging_steps=1"),
    *("--save_strategy=steps", f"--save_steps={STEPS // 2}", f"--max_steps={STEPS}", "--remove_unused_columns=False"),
]
MODELS = {"llama": ("v1", "llava_llama"), "qwen2": ("qwen_1_5", "llava_qwen")}


def bare_llama(place, tokenizer_folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **LLAMA)).save_pretrained(place)
    shutil.copytree(tokenizer_folder, place, dirs_exist_ok=True)


def bare_qwen2(place, _):
    """With a tokenizer of bytes, whose beginnings and ends of turns are tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Config, Qwen2ForCausalLM

    Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **LLAMA)).save_pretrained(place)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        QUESTIONS * 20, trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, special_tokens=special)
    )
    tokenizer.save(str(place / "tokenizer.json"))
    names = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256, **names}
    (place / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory, clip_folder, tokenizer_folder):
    """A folder with `data.json`, pictures, and the adapter `mine` of a run from a bare language model."""
    place = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    (place / "base").mkdir()
    {"llama": bare_llama, "qwen2": bare_qwen2}[request.param](place / "base", tokenizer_folder)
    draw_pictures(place, 8)
    samples = []
    for number in range(16):
        answer = "blue" if number % 8 < 4 else "red"
        turns = [("human", f"<image>\n{QUESTIONS[number % 4]}"), ("gpt", answer)]
        conversations = [{"from": speaker, "value": text} for speaker, text in turns]
        samples.append({"id": str(number), "image": f"{number % 8}.png", "conversations": conversations})
    (place / "data.json").write_text(json.dumps(samples))
    version, _ = MODELS[request.param]
    flags = {
        "model_name_or_path": place / "base",
        "version": version,
        "data_path": place / "data.json",
        "image_folder": place,
        "vision_tower": clip_folder,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False,
        "model_max_length": 256,
        "report_to": "none",
        "lora_r": 2,
        "lora_dropout": 0.0,
        "bf16": False,
        "use_cpu": True,
        "seed": 0,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    train(ALONE, words, place / "mine", *FLAGS)
    return request.param, place, words


def run(*words, cwd):
    done = subprocess.run([*PLUGIN, *map(str, words)], cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def answers(place, model, output, *words):
    asked = ["--questions", place / "data.json", "--image-folder", place, "--max-new-tokens", 4]
    run("eval", "--model-path", model, "--output", output, *asked, *words, cwd=place)
    lines = (place / output / "answers.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_loss_falls_and_the_model_keeps_its_type(trained):
    name, place, _ = trained
    found = losses(place / "mine")
    assert len(found) == STEPS and found[-1] < 0.7 * found[0]
    config = json.loads((place / "mine" / "config.json").read_text())
    assert config["mm_vision_tower"] and config["model_type"] in (MODELS[name][1], name)


def test_interrupted_run_goes_on_to_the_same_adapter(trained):
    _, place, words = trained
    (place / "again").mkdir()
    shutil.copytree(place / "mine" / f"checkpoint-{STEPS // 2}", place / "again" / f"checkpoint-{STEPS // 2}")
    train(ALONE, words, place / "again", *FLAGS)
    for file in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        assert (place / "again" / file).read_bytes() == (place / "mine" / file).read_bytes()


def test_every_question_of_a_batch_is_answered_as_alone(trained):
    _, place, _ = trained
    alone = answers(place, "mine", "alone", "--batch-size", 1)
    assert len(alone) == 16 and answers(place, "mine", "together", "--batch-size", 5) == alone


def test_its_own_loader_takes_the_merged_model(trained):
    name, place, _ = trained
    merged = f"llava-{name}-merged"  # it chooses the class by words in the name
    words = ["--model-path", "mine", "--save-model-path", merged, "--image-folder", place, "--steps", 20, "--force"]
    run("merge", *words, cwd=place)
    assert len(answers(place, merged, "merged")) == 16
    program = f"""
import torch
from llava.model.builder import load_pretrained_model
from llava.mm_utils import get_model_name_from_path
name = get_model_name_from_path({merged!r})
_, model, processor, _ = load_pretrained_model({merged!r}, None, name, device_map="auto", attn_implementation="eager")
assert processor is not None and all(torch.isfinite(each).all() for each in model.parameters())
print(type(model).__name__)
"""
    (place / "load.py").write_text(program)
    told = run("run", "load.py", cwd=place).splitlines()[-1]
    assert told == {"llama": "LlavaLlamaForCausalLM", "qwen2": "LlavaQwenForCausalLM"}[name]
    assert "base_layer" not in " ".join(
        json.loads((place / merged / "model.safetensors.index.json").read_text())["weight_map"]
        if (place / merged / "model.safetensors.index.json").is_file()
        else _names(place / merged / "model.safetensors")
    )


def _names(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())
