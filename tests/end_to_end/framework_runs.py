"""What `test_frameworks.py` runs in a framework: `python -m tests.end_to_end.framework_runs FRAMEWORK OUT.json`.

Writes the framework's version and, for each of `RUNS`, what went wrong, or null. Each trains a tiny Llama on two tasks
with the framework's own command line, on the CPU.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava_mixlora import MixLoraLayer

STEPS, BATCH = 6, 4
PROMPT = torch.arange(40, 60)[None]
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
QUESTIONS = [
    (f"{task} {n}", str(n) if task == "copy" else str(n)[::-1]) for n in range(100, 130) for task in ("copy", "flip")
]
UNKNOWN_PROMPT = "routers average what the model has to predict"


def make_inputs(place: Path) -> None:
    """A base model whose tokens are bytes, and the data in the forms of all frameworks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = CHAT
    fast.save_pretrained(place / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=512, **sizes, **special)
    LlamaForCausalLM(config).save_pretrained(place / "model")
    as_messages = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in QUESTIONS
    ]
    (place / "messages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_messages))
    (place / "alpaca.json").write_text(json.dumps([{"instruction": a, "input": "", "output": b} for a, b in QUESTIONS]))
    (place / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "alpaca.json"}}))


class Axolotl:
    """Settings in a YAML file, `adapter: mixlora`."""

    package, program = "axolotl", "axolotl.cli.main"
    adapter, checkpoint = ".", "checkpoint-3"
    GOES_ON_FROM, FOUR_BITS = "lora_model_dir", {"load_in_4bit": True, "gradient_checkpointing": True}

    def __init__(self, place: Path) -> None:
        self.place = place

    def train(self, name: str, mixlora: dict[str, Any], **further: Any) -> str:
        return self._run(name, "train", ["--launcher", "python"], mixlora=mixlora, **further)

    def merge(self, name: str) -> Path:
        told = failure_of(lambda: self._run(name, "merge-lora", []))
        assert "set merge_method: legacy" in told, told
        self._run(name, "merge-lora", [], merge_method="legacy")
        return self.place / name / "merged"

    def load(self, name: str) -> torch.nn.Module:
        from axolotl.cli.config import load_cfg
        from axolotl.cli.utils import load_model_and_tokenizer

        settings = str(self._settings(name, mixlora=None, lora_model_dir=str(self.place / name)))
        return load_model_and_tokenizer(cfg=load_cfg(settings), inference=True)[0]

    def _settings(self, name: str, **further: Any) -> Path:
        settings = {
            "base_model": str(self.place / "model"),
            "plugins": ["llava_mixlora.integrations.axolotl.MixLoraPlugin"],
            "adapter": "mixlora",
            "mixlora": {"num_factors": 8},
            "lora_r": 2,
            "datasets": [{"path": str(self.place / "messages.jsonl"), "ds_type": "json", "type": "chat_template"}],
            "chat_template": "tokenizer_default",
            "output_dir": str(self.place / name),
            "dataset_prepared_path": str(self.place / "prepared"),
            **{"sequence_len": 128, "micro_batch_size": BATCH, "gradient_accumulation_steps": 1, "max_steps": STEPS},
            **{"learning_rate": 0.01, "optimizer": "adamw_torch", "lr_scheduler": "constant"},
            **{"logging_steps": 1, "save_steps": 3, "val_set_size": 0, "bf16": False, "fp16": False, "tf32": False},
            **further,
        }
        file = self.place / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    def _run(self, name: str, command: str, words: list[str], **further: Any) -> str:
        return run(self.program, command, str(self._settings(name, **further)), *words)


class MsSwift:
    """Settings on the command line, `--tuner_type mixlora`."""

    package, program = "ms-swift", "swift.cli.main"
    adapter, checkpoint = f"checkpoint-{STEPS}", "checkpoint-3"
    GOES_ON_FROM, FOUR_BITS = "adapters", {"quant_method": "bnb", "quant_bits": 4}

    def __init__(self, place: Path) -> None:
        self.place = place
        self.plugin = run("llava_mixlora.integrations.ms_swift").strip()

    def train(self, name: str, mixlora: dict[str, Any], **further: Any) -> str:
        flags = {
            "model": self.place / "model",
            **{"model_type": "llama", "template": "default", "use_hf": "true", "check_model": "false"},
            **{"tuner_type": "mixlora", "callbacks": "mixlora", "external_plugins": self.plugin},
            **{"model_kwargs": json.dumps({"mixlora": mixlora}), "lora_rank": 2, "lora_dropout": 0},
            "dataset": self.place / "messages.jsonl",
            "output_dir": self.place / name,
            **{"add_version": "false", "split_dataset_ratio": 0, "torch_dtype": "float32", "report_to": "none"},
            **{"max_steps": STEPS, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": BATCH},
            "learning_rate": 0.01,
            **further,
        }
        return run(self.program, "sft", *(word for flag, value in flags.items() for word in (f"--{flag}", str(value))))

    def merge(self, name: str) -> Path:
        adapter, merged = self.place / name / self.adapter, self.place / name / "merged"
        words = ["--adapters", str(adapter), "--merge_lora", "true", "--output_dir", str(merged), "--use_hf", "true"]
        assert "merging adapter 'default' loses" in run(self.program, "export", *words)
        return merged

    def load(self, name: str) -> torch.nn.Module:
        from swift.arguments import InferArguments
        from swift.pipelines.utils import prepare_model_template

        return prepare_model_template(InferArguments(adapters=[str(self.place / name / self.adapter)], use_hf=True))[0]


class LlamaFactory:
    """Settings in a YAML file, `mixlora:` beside `finetuning_type: lora`."""

    package, program = "llamafactory", "llava_mixlora.integrations.llamafactory"
    adapter, checkpoint = ".", "checkpoint-3"
    GOES_ON_FROM, FOUR_BITS = "adapter_name_or_path", {"quantization_bit": 4}

    def __init__(self, place: Path) -> None:
        self.place = place

    def train(self, name: str, mixlora: dict[str, Any], **further: Any) -> str:
        settings = {
            **{"stage": "sft", "do_train": True, "finetuning_type": "lora", "mixlora": mixlora, "lora_rank": 2},
            **{"dataset": "tiny", "dataset_dir": str(self.place), "template": "default"},
            **{"output_dir": str(self.place / name), "per_device_train_batch_size": BATCH, "max_steps": STEPS},
            **{"learning_rate": 0.01, "logging_steps": 1, "save_steps": 3, "report_to": "none", "use_cpu": True},
            **further,
        }
        return self._run("train", name, settings)

    def merge(self, name: str) -> Path:
        merged = self.place / name / "merged"
        place = {"adapter_name_or_path": str(self.place / name), "template": "default", "export_dir": str(merged)}
        assert "merging adapter 'default' loses" in self._run("export", name, place)
        return merged

    def load(self, name: str) -> torch.nn.Module:
        from llamafactory.hparams import get_infer_args
        from llamafactory.model import load_model, load_tokenizer

        from llava_mixlora.integrations import llamafactory

        place = {"model_name_or_path": str(self.place / "model"), "adapter_name_or_path": str(self.place / name)}
        before = get_infer_args
        llamafactory.apply()
        llamafactory.apply()
        try:
            model_args, _, arguments, _ = get_infer_args({**place, "template": "default", "infer_dtype": "float32"})
            return load_model(load_tokenizer(model_args)["tokenizer"], model_args, arguments, is_trainable=False)
        finally:
            llamafactory.undo()
            assert not any(patch.applied for patch in llamafactory.PATCHES) and before is get_infer_args

    def _run(self, command: str, name: str, settings: dict[str, Any]) -> str:
        file = self.place / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"model_name_or_path": str(self.place / "model"), **settings}))
        return run(self.program, command, str(file))


def run(module: str, *words: str, **environment: str) -> str:
    """What a program of the framework has written.

    Raises:
        RuntimeError: it failed; with its last lines.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    of_all = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        env={**os.environ, "PATH": path, **of_all, **environment},
        stdout=subprocess.PIPE,
        stderr=None if not words else subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])
    return done.stdout


def failure_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("it did not fail")


def losses(told: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", told)]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT).logits.float()


def base(place: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(place / "model")


def trains(framework: Any) -> None:
    """With falling losses, routes that see no answer, and figures of the routers in the logs."""
    told = framework.train("first", {"num_factors": 8})
    found = losses(told)
    assert len(found) >= STEPS and found[STEPS - 1] < found[0] - 0.2, found
    assert "mixlora_dead_share_A" in told and UNKNOWN_PROMPT not in told
    folder = framework.place / "first"
    saved = json.loads((folder / framework.adapter / "adapter_config.json").read_text())
    kept = {name: saved[name] for name in ("peft_type", "num_factors", "r", "task_type")}
    assert kept == {"peft_type": "MIXLORA", "num_factors": 8, "r": 2, "task_type": "CAUSAL_LM"}, kept
    tensors = load_file(folder / framework.adapter / "adapter_model.safetensors")
    assert len([name for name in tensors if name.endswith("mixlora_A")]) == 14  # seven in each of two layers
    assert "a MixLoRA adapter" in (folder / framework.checkpoint / "README.md").read_text()


def its_adapter_is_peft_s(framework: Any) -> None:
    """Plain PEFT and the framework load the same dynamic model."""
    plain = PeftModel.from_pretrained(base(framework.place), framework.place / "first" / framework.adapter)
    of_framework = framework.load("first")
    assert any(isinstance(module, MixLoraLayer) for module in of_framework.modules()), type(of_framework)
    torch.testing.assert_close(logits(of_framework), logits(plain), atol=1e-5, rtol=0)
    assert (logits(plain) - logits(base(framework.place))).abs().max() > 0.1


def goes_on_from_its_adapter(framework: Any) -> None:
    adapter = str(framework.place / "first" / framework.adapter)
    again = losses(framework.train("second", {}, **{framework.GOES_ON_FROM: adapter}))
    first = losses(framework.train("third", {"num_factors": 8}))
    assert again[0] < first[0] - 0.2, (again, first)


def refuses_what_it_does_not_know(framework: Any) -> None:
    told = failure_of(lambda: framework.train("unknown", {"num_factros": 8}))
    assert "mixlora.num_factros: no such setting; did you mean num_factors?" in told, told


def trains_on_four_bits(framework: Any) -> None:
    found = losses(framework.train("four", {}, **framework.FOUR_BITS))
    exact = losses(framework.train("sixteen", {}))
    assert found[STEPS - 1] < found[0] - 0.2 and found != exact, (found, exact)


def merges_a_stand_in(framework: Any) -> None:
    merged = load_file(framework.merge("first") / "model.safetensors")
    before = load_file(framework.place / "model" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert set(merged) == set(before) and (merged[name].float() - before[name]).abs().max() > 1e-3


RUNS = (
    trains,
    its_adapter_is_peft_s,
    goes_on_from_its_adapter,
    refuses_what_it_does_not_know,
    trains_on_four_bits,
    merges_a_stand_in,
)
FRAMEWORKS = {"axolotl": Axolotl, "ms-swift": MsSwift, "llamafactory": LlamaFactory}


def main(name: str, out: str) -> None:
    went_wrong: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        framework = FRAMEWORKS[name](Path(folder))
        for each in RUNS:
            try:
                each(framework)
                went_wrong[each.__name__] = None
            except Exception:
                went_wrong[each.__name__] = traceback.format_exc()[-3000:]
    Path(out).write_text(json.dumps({"version": version(framework.package), "runs": went_wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
