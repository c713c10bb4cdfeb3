"""The main job on the embedded default: what `scripts/finetune_mixlora.sh` runs when no MODEL is given.

Each stage leaves a complete result or none. Data, vision tower, tokenizer, base model and the base model's answers are
kept in the cache folder for later runs; an interrupted run goes on at the stage in which it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playground import PLAYGROUND
from playground.atomic import write_json

if TYPE_CHECKING:
    import torch

IMAGES, HELDOUT, TRAIN = "images", "heldout.json", "train.json"
RESULTS = "results.json"
TRAINED_WITH = "playground_run.json"  # in the output folder: the training's settings, and whether it is finished
TRIAL_STEPS, TRIAL_QUESTIONS, TRIAL_BATCH_SIZE = 4, 3, 2
FINETUNING = {"learning_rate": 2e-3, "per_device_train_batch_size": 48, "max_steps": 400}
LANGUAGE_MODELS = {"tiny": {}, "smollm2": {"learning_rate": 5e-4}}  # and what is different in their fine-tuning
TRIALS = {
    "tiny": {"max_steps": TRIAL_STEPS},
    "smollm2": {"max_steps": TRIAL_STEPS, "per_device_train_batch_size": TRIAL_BATCH_SIZE},
}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 2}


def main() -> int:
    """Command line; returns the exit status."""
    arguments = _parser().parse_args()
    from llava_mixlora import MixLoraError

    try:
        run(arguments)
    except MixLoraError as error:
        return _stop(f"error: {error}")
    except subprocess.CalledProcessError as error:
        return _stop(f"error: training stopped with exit status {error.returncode}; its messages are above")
    except KeyboardInterrupt:
        return _stop("\ninterrupted; the same command goes on with this stage", status=130)
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Prepare what is missing, fine-tune, evaluate before and after, and show the results."""
    started = time.monotonic()
    from llava_mixlora import MixLoraConfig
    from llava_mixlora.inputs import check_writable
    from llava_mixlora.method.model_card import add_results
    from llava_mixlora.training.preflight import check_quantization

    MixLoraConfig(r=arguments.rank, num_factors=arguments.factors, routing=arguments.routing)
    check_quantization(arguments.flags)
    for folder in (arguments.output, arguments.cache):
        check_writable(folder)

    base = (prepare_smollm2 if arguments.language_model == "smollm2" else prepare_base)(arguments)
    data, output = arguments.cache / "data", arguments.output
    settings = {
        "mixlora_routing": arguments.routing,
        "mixlora_num_factors": arguments.factors,
        "lora_r": arguments.rank,
        "lora_alpha": 2 * arguments.factors,  # the authors' ratio
        "lora_dropout": 0.0,
        "seed": arguments.seed,
        **FINETUNING,
        **LANGUAGE_MODELS[arguments.language_model],
        **(TRIALS[arguments.language_model] if arguments.trial else {}),
    }
    finetune(settings, arguments.flags, base, data, output)

    from playground import report
    from playground.answers import read_questions
    from playground.measuring import machine

    questions = read_questions(data / HELDOUT, TRIAL_QUESTIONS if arguments.trial else None)
    _announce("Asking the base model the held-out questions")
    before = _answers_of_base(base, questions, arguments.cache)
    _announce("Asking the fine-tuned model")
    after = _answers_of(output, questions, data)
    seconds = time.monotonic() - started
    contents = report.results(questions, before, after.texts, trainable_parameters(output), seconds)
    contents["machine"] = machine(_device())
    report.draw_contact_sheet(output / "contact_sheet.png", questions, after.texts, data / IMAGES)
    report.draw_loss_curve(output / "loss_curve.png", output / "trainer_state.json")
    report.draw_factor_usage(output / "factor_usage.png", after)
    write_json(output / RESULTS, contents)
    add_results(output, report.markdown(contents))
    _show(contents, report.samples(questions, after.texts), report.table(contents), output, data)


def prepare_base(arguments: argparse.Namespace) -> Path:
    """Build what the cache folder lacks; returns the folder of the tiny LLaVA."""
    from playground.base import tiny_base, tiny_tokenizer

    cache, seed = arguments.cache, arguments.seed
    data, tower, tokenizer, base = (cache / name for name in ("data", "tower", "tokenizer", "llava-v1-tiny"))
    steps = TRIAL_STEPS if arguments.trial else tiny_base.STEPS
    key, tower_key = _prepare_tower(arguments)
    words_key = _stage("3/4 tokenizer", tokenizer, [key, tiny_tokenizer], lambda: tiny_tokenizer.build(data, tokenizer))
    _stage(
        "4/4 base model",
        base,
        [tower_key, words_key, steps, tiny_base, str(tower.absolute())],
        lambda: tiny_base.build(data, tower, tokenizer, base, seed, steps),
    )
    return base


def prepare_smollm2(arguments: argparse.Namespace) -> Path:
    """Build what the cache folder lacks; returns the folder of the LLaVA around SmolLM2."""
    from playground.base import smollm2_base

    cache, seed = arguments.cache, arguments.seed
    data, tower, language_model, base = (cache / name for name in ("data", "tower", "smollm2", "llava-v1-smollm2"))
    steps = TRIAL_STEPS if arguments.trial else smollm2_base.STEPS
    batch_size = TRIAL_BATCH_SIZE if arguments.trial else smollm2_base.BATCH_SIZE
    _, tower_key = _prepare_tower(arguments)
    words_key = _stage("3/4 SmolLM2", language_model, [smollm2_base], lambda: smollm2_base.unpack(language_model))
    _stage(
        "4/4 projector",
        base,
        [tower_key, words_key, steps, batch_size, str(tower.absolute())],
        lambda: smollm2_base.build(data, tower, language_model, base, seed, steps, batch_size),
    )
    return base


def _prepare_tower(arguments: argparse.Namespace) -> tuple[str, str]:
    """Data and vision tower; returns their keys."""
    from playground.base import tiny_tower
    from playground.data import tasks

    data, tower, seed = arguments.cache / "data", arguments.cache / "tower", arguments.seed
    steps = TRIAL_STEPS if arguments.trial else tiny_tower.STEPS
    key = _stage("1/4 pictures and questions", data, [seed, tasks], lambda: tasks.build(data, seed))
    return key, _stage(
        "2/4 vision tower",
        tower,
        [key, steps, tiny_tower],
        lambda: tiny_tower.build(data, tower, seed, steps),
    )


def finetune(settings: dict[str, Any], flags: list[str], base: Path, data: Path, output: Path) -> None:
    """Train the adapter through upstream's `train()`, or go on where an interrupted run of the same settings was."""
    from playground.base.tiny_base import train

    trained_with = {**settings, "flags": flags, "base": (base / MADE_FROM).read_text()}
    record = output / TRAINED_WITH
    started = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    interrupted = started.get("settings") == trained_with and not (output / RESULTS).exists()
    if interrupted and started["finished"]:
        _announce("Fine-tuning: done by the interrupted run")
        return
    _announce(f"Fine-tuning with MixLoRA: {settings['max_steps']} steps")
    if not interrupted:
        for leftover in (record, output / RESULTS):
            leftover.unlink(missing_ok=True)
        for checkpoint in output.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)  # of another run; upstream would go on from it
        write_json(record, {"settings": trained_with, "finished": False})
    train(
        {
            "mixlora_enable": True,
            "model_name_or_path": base.absolute(),
            "data_path": data / TRAIN,
            "image_folder": data / IMAGES,
            "vision_tower": (data.parent / "tower").absolute(),
            "output_dir": output,
            **CHECKPOINTS,
            **settings,
        },
        flags,
    )
    write_json(record, {"settings": trained_with, "finished": True})


def trainable_parameters(adapter: Path) -> int:
    """How many numbers training could change: pools, routers that learn, and what was trained beside them."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    from llava_mixlora.adapters.adapter_folder import read_non_lora_trainables

    learns = PeftConfig.from_pretrained(str(adapter)).router_gradient != "none"
    kinds = ["mixlora_A", "mixlora_B", *(["mixlora_router", "mixlora_cfs"] if learns else [])]
    total = sum(tensor.numel() for tensor in read_non_lora_trainables(adapter).values())
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        if any(f".{kind}" in name for kind in kinds):
            total += tensor.numel()
    return total


MADE_FROM = "made_from.txt"
"""In every cached folder, written last: a digest of the code, the seed and the earlier stages it was made from."""


def _stage(title: str, folder: Path, ingredients: list[Any], build: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    for ingredient in ingredients:
        source = getattr(ingredient, "__file__", None)
        digest.update(Path(source).read_bytes() if source else str(ingredient).encode())
    key, stamp = digest.hexdigest(), folder / MADE_FROM
    if stamp.is_file() and stamp.read_text() == key:
        _announce(f"{title}: cached in {folder}")
        return key
    _announce(title)
    stamp.unlink(missing_ok=True)
    build()
    stamp.write_text(key)
    return key


def _answers_of_base(base: Path, questions: list[dict[str, Any]], cache: Path) -> list[str]:
    key = hashlib.sha256(json.dumps(questions).encode() + (base / MADE_FROM).read_bytes()).hexdigest()
    stored = cache / f"answers_of_{base.name}.json"
    if stored.is_file() and (content := json.loads(stored.read_text(encoding="utf-8")))["key"] == key:
        return content["texts"]
    texts = _answers_of(base, questions, cache / "data").texts
    write_json(stored, {"key": key, "texts": texts})
    return texts


def _answers_of(folder: Path, questions: list[dict[str, Any]], data: Path) -> Any:
    from llava_mixlora import patches

    patches.apply()
    from llava.model.builder import load_pretrained_model

    from playground.answers import answer

    device = _device().type
    loaded = load_pretrained_model(str(folder), None, "llava-v1-tiny", device_map=device, device=device)
    tokenizer, model, image_processor, _ = loaded
    return answer((tokenizer, model.float(), image_processor), questions, data / IMAGES)


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _show(
    contents: dict[str, Any], samples: list[tuple[dict[str, Any], str]], table: str, output: Path, data: Path
) -> None:
    print(f"\n{table}\n")
    print("Six held-out questions:")
    for question, text in samples:
        mark = "right" if text == question["truth"] else f"wrong, truth: {question['truth']}"
        print(f"  {question['image']}: {question['question']}  ->  {text}  ({mark})")
    print(f"\ntrainable parameters: {contents['trainable_parameters']:,}    wall time: {contents['seconds']:.0f} s")
    print(f"adapter:  {output}")
    print(f"results:  {output / RESULTS}")
    print(f"pictures: {', '.join(str(output / name) for name in PICTURES)}")
    print(
        "\nTalk to it:\n  source scripts/setup.sh\n"
        f"  llava-mixlora run -m llava.serve.cli --model-path {output} "
        f"--image-file {data / IMAGES / samples[0][0]['image']} --device cpu --temperature 0"
    )


PICTURES = ("contact_sheet.png", "loss_curve.png", "factor_usage.png")


def _announce(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _stop(message: str, status: int = 1) -> int:
    print(message, file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune_mixlora.sh", description="Fine-tune a small LLaVA with MixLoRA on twelve tasks over real images."
    )
    parser.add_argument(
        "--language-model", choices=LANGUAGE_MODELS, default="tiny", help="trained here, or SmolLM2-135M (a GPU's work)"
    )
    parser.add_argument("--routing", default="ifs_cfs", help="ifs_cfs, ifs or random (default: %(default)s)")
    parser.add_argument("--factors", type=int, default=16, help="factors in each pool (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=4, help="factors chosen per instance (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=PLAYGROUND / "output" / "llava-v1-tiny-mixlora", help="adapter folder"
    )
    parser.add_argument(
        "--cache", type=Path, default=PLAYGROUND / "cache", help="data and base model (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    parser.add_argument(
        "--trial", action="store_true", help="a few steps and questions only, to see that everything runs"
    )
    parser.add_argument("flags", nargs="*", help="after --: further flags of llava.train.train")
    return parser


if __name__ == "__main__":
    sys.exit(main())
