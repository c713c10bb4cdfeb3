"""The main job on the embedded default: what `scripts/finetune_mixlora.sh` runs when no MODEL is given.

Beside MixLoRA it trains a plain LoRA whose rank is the number of factors, on the same data and for as many steps, each
of the two at the learning rate that suits it.

Each stage leaves a complete result or none. Data, vision tower, tokenizer, base model and the base model's answers are
kept in the cache folder for later runs, the LoRA and its answers beside the output folder; an interrupted run goes on
at the stage in which it stopped.
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
from playground.data.main_job import HELDOUT, TRAIN

if TYPE_CHECKING:
    import torch

    from playground.answers import Answers

IMAGES, QUESTIONS = "images", "questions"  # folders: of the pictures within the data, and beside the data
RESULTS = "results.json"
TRAINED_WITH = "playground_run.json"  # in the output folder: the training's settings, and whether it is finished
TRIAL_STEPS, TRIAL_QUESTIONS, TRIAL_BATCH_SIZE = 4, 3, 2
FINETUNING = {"learning_rate": 2e-3, "per_device_train_batch_size": 48, "max_steps": 200}
FINETUNING_OF_LORA = {**FINETUNING, "learning_rate": 2e-3}
LANGUAGE_MODELS = {"tiny": {}, "smollm2": {"learning_rate": 5e-4}}  # and what is different in their fine-tuning
TRIALS = {
    "tiny": {"max_steps": TRIAL_STEPS},
    "smollm2": {"max_steps": TRIAL_STEPS, "per_device_train_batch_size": TRIAL_BATCH_SIZE},
}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 2}


def main() -> int:
    """Command line; returns the exit status."""
    arguments = parser().parse_args()
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
    from llava_mixlora.training.given_flags import given_flags
    from llava_mixlora.training.preflight import check_quantization

    MixLoraConfig(r=arguments.rank, num_factors=arguments.factors, routing=arguments.routing)
    check_quantization(given_flags(arguments.flags))
    for folder in (arguments.output, arguments.cache):
        check_writable(folder)

    base = (prepare_smollm2 if arguments.language_model == "smollm2" else prepare_base)(arguments)
    questions = arguments.cache / QUESTIONS
    prepare_questions(arguments, questions)
    paths = {
        "model_name_or_path": base.absolute(),
        "data_path": questions / TRAIN,
        "image_folder": arguments.cache / "data" / IMAGES,
        "vision_tower": (arguments.cache / "tower").absolute(),
    }
    output = arguments.output
    lora = lora_beside(output)
    finetune("MixLoRA", settings_of_mixlora(arguments), paths, arguments.flags, output)
    finetune("a plain LoRA", settings_of_lora(arguments), paths, without_mixlora(arguments.flags), lora)

    from playground import report
    from playground.answers import read_questions
    from playground.measuring import machine

    asked = read_questions(questions / HELDOUT, TRIAL_QUESTIONS if arguments.trial else None)
    images = arguments.cache / "data" / IMAGES
    _announce("Asking the base model the held-out questions")
    stored = arguments.cache / f"answers_of_{base.name}.json"
    before = _kept_answers(base, None, MADE_FROM, asked, images, stored)
    _announce("Asking the plain LoRA")
    of_lora = _kept_answers(lora, base, TRAINED_WITH, asked, images, lora / "answers.json")
    _announce("Asking the model fine-tuned with MixLoRA")
    after = _answers_of(output, None, asked, images)
    contents = report.results(asked, before, after.texts, of_lora)
    contents["seconds"] = round(time.monotonic() - started, 1)
    contents["trainable_parameters"] = trainable_parameters(output)
    contents["lora"] |= {"r": arguments.factors, "trainable_parameters": trainable_parameters(lora)}
    contents["machine"] = machine(_device())
    report.draw_contact_sheet(output / "contact_sheet.png", asked, after.texts, images)
    report.draw_loss_curve(output / "loss_curve.png", output / "trainer_state.json", lora / "trainer_state.json")
    report.draw_factor_usage(output / "factor_usage.png", after)
    write_json(output / RESULTS, contents)
    add_results(output, report.markdown(contents))
    _show(contents, report.samples(asked, after.texts), report.table(contents), output, images)


def lora_beside(output: Path) -> Path:
    """The folder of the plain LoRA that belongs to the adapter in `output`."""
    return output.with_name(f"{output.name}-lora")


def settings_of_mixlora(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that make and train the MixLoRA adapter."""
    routing = {} if arguments.routing is None else {"mixlora_routing": arguments.routing}
    return {
        "mixlora_enable": True,
        **routing,
        "mixlora_num_factors": arguments.factors,
        "lora_r": arguments.rank,
        **_common_settings(arguments, FINETUNING),
    }


def settings_of_lora(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of the plain LoRA, in which every instance uses as many factors as a pool of the MixLoRA adapter holds."""
    return {"lora_enable": True, "lora_r": arguments.factors, **_common_settings(arguments, FINETUNING_OF_LORA)}


def _common_settings(arguments: argparse.Namespace, finetuning: dict[str, Any]) -> dict[str, Any]:
    return {
        "lora_alpha": 2 * arguments.factors,  # the authors' ratio
        "lora_dropout": 0.0,
        "seed": arguments.seed,
        **finetuning,
        **LANGUAGE_MODELS[arguments.language_model],
        **(TRIALS[arguments.language_model] if arguments.trial else {}),
    }


def without_mixlora(flags: list[str]) -> list[str]:
    """The flags that upstream knows too: without `--mixlora_...` and its value."""
    kept, mine = [], False
    for word in flags:
        if word.startswith("--"):
            mine = word.startswith("--mixlora_")
        if not mine:
            kept.append(word)
    return kept


def prepare_base(arguments: argparse.Namespace) -> Path:
    """Build what the cache folder lacks; returns the folder of the tiny LLaVA."""
    from playground.base import tiny_base, tiny_tokenizer

    cache, seed = arguments.cache, arguments.seed
    data, tower, tokenizer, base = (cache / name for name in ("data", "tower", "tokenizer", "llava-v1-tiny"))
    steps = TRIAL_STEPS if arguments.trial else tiny_base.STEPS
    key, tower_key = _prepare_tower(arguments)
    words_key = _stage("3/5 tokenizer", tokenizer, [key, tiny_tokenizer], lambda: tiny_tokenizer.build(data, tokenizer))
    _stage(
        "4/5 base model",
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
    words_key = _stage("3/5 SmolLM2", language_model, [smollm2_base], lambda: smollm2_base.unpack(language_model))
    _stage(
        "4/5 projector",
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
    key = _stage("1/5 pictures and questions", data, [seed, tasks], lambda: tasks.build(data, seed))
    return key, _stage(
        "2/5 vision tower",
        tower,
        [key, steps, tiny_tower],
        lambda: tiny_tower.build(data, tower, seed, steps),
    )


def prepare_questions(arguments: argparse.Namespace, folder: Path) -> None:
    """Build what the main job trains on and asks, unless `folder` has it."""
    from playground.data import code_books, main_job

    data = arguments.cache / "data"
    _stage(
        "5/5 questions of the main job",
        folder,
        [(data / MADE_FROM).read_text(), arguments.seed, main_job, code_books],
        lambda: main_job.build(data, folder, arguments.seed),
    )


def finetune(what: str, settings: dict[str, Any], paths: dict[str, Any], flags: list[str], output: Path) -> None:
    """Train an adapter through upstream's `train()`, or go on where an interrupted run of the same settings was.

    What is finished is trained again only where `RESULTS` tell that it was all that was wanted.
    """
    from playground.base.tiny_base import train

    made_from = [
        (folder / MADE_FROM).read_text() for folder in (paths["model_name_or_path"], paths["data_path"].parent)
    ]
    trained_with = {**settings, "flags": flags, "made_from": made_from}
    record = output / TRAINED_WITH
    started = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    interrupted = started.get("settings") == trained_with and not (output / RESULTS).exists()
    if interrupted and started["finished"]:
        _announce(f"Fine-tuning with {what}: done by an earlier run")
        return
    _announce(f"Fine-tuning with {what}: {settings['max_steps']} steps")
    if not interrupted:
        for leftover in (record, output / RESULTS):
            leftover.unlink(missing_ok=True)
        for checkpoint in output.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)  # of another run; upstream would go on from it
        output.mkdir(parents=True, exist_ok=True)
        write_json(record, {"settings": trained_with, "finished": False})
    train({**paths, "output_dir": output, **CHECKPOINTS, **settings}, flags)
    write_json(record, {"settings": trained_with, "finished": True})


def trainable_parameters(adapter: Path) -> int:
    """How many numbers training could change, of a MixLoRA adapter or a LoRA, with what was trained beside them."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    from llava_mixlora.adapters.adapter_folder import read_non_lora_trainables

    learns = getattr(PeftConfig.from_pretrained(str(adapter)), "router_gradient", None) != "none"
    kinds = ["lora_A", "lora_B", *(["mixlora_router", "mixlora_cfs"] if learns else [])]
    total = sum(tensor.numel() for tensor in read_non_lora_trainables(adapter).values())
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        if any(kind in name for kind in kinds):
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


def _kept_answers(
    model: Path, base: Path | None, made_from: str, questions: list[dict[str, Any]], images: Path, stored: Path
) -> list[str]:
    """The texts of `_answers_of`, asked once for the same questions and the same contents of the file `made_from`."""
    key = hashlib.sha256(json.dumps(questions).encode() + (model / made_from).read_bytes()).hexdigest()
    if stored.is_file() and (content := json.loads(stored.read_text(encoding="utf-8")))["key"] == key:
        return content["texts"]
    texts = _answers_of(model, base, questions, images).texts
    write_json(stored, {"key": key, "texts": texts})
    return texts


def _answers_of(folder: Path, base: Path | None, questions: list[dict[str, Any]], images: Path) -> Answers:
    """`base`: what a plain LoRA belongs to; upstream's loader has to be told."""
    from llava_mixlora import patches

    patches.apply()
    from llava.model.builder import load_pretrained_model

    from playground.answers import answer

    device = _device().type
    name = "llava-v1-tiny" if base is None else "llava-v1-tiny-lora"
    loaded = load_pretrained_model(str(folder), base and str(base), name, device_map=device, device=device)
    tokenizer, model, image_processor, _ = loaded
    return answer((tokenizer, model.float(), image_processor), questions, images)


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _show(
    contents: dict[str, Any], samples: list[tuple[dict[str, Any], str]], table: str, output: Path, images: Path
) -> None:
    print(f"\n{table}\n")
    print("Six held-out questions:")
    for question, text in samples:
        mark = "right" if text == question["truth"] else f"wrong, truth: {question['truth']}"
        print(f"  {question['image']}: {question['question']}  ->  {text}  ({mark})")
    trained, of_lora = contents["trainable_parameters"], contents["lora"]["trainable_parameters"]
    print(
        f"\ntrainable parameters: {trained:,} (LoRA: {of_lora:,})    wall time: {contents['seconds']:.0f} s\n"
        f"adapter:  {output}\n"
        f"results:  {output / RESULTS}\n"
        f"pictures: {', '.join(str(output / name) for name in PICTURES)}\n"
        "\nTalk to it:\n  source scripts/setup.sh\n"
        f"  llava-mixlora run -m llava.serve.cli --model-path {output} "
        f"--image-file {images / samples[0][0]['image']} --device cpu --temperature 0"
    )


PICTURES = ("contact_sheet.png", "loss_curve.png", "factor_usage.png")


def _announce(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _stop(message: str, status: int = 1) -> int:
    print(message, file=sys.stderr)
    return status


def parser() -> argparse.ArgumentParser:
    """Describes the command."""
    made = argparse.ArgumentParser(
        prog="finetune_mixlora.sh",
        description="Fine-tune a small LLaVA on fifteen tasks over real images.",
    )
    made.add_argument(
        "--language-model", choices=LANGUAGE_MODELS, default="tiny", help="trained here, or SmolLM2-135M (a GPU's work)"
    )
    made.add_argument("--routing", help="ifs_cfs, ifs or random (default: MixLoraConfig's)")
    made.add_argument("--factors", type=int, default=16, help="factors in each pool (default: %(default)s)")
    made.add_argument("--rank", type=int, default=4, help="factors chosen per instance (default: %(default)s)")
    made.add_argument(
        "--output", type=Path, default=PLAYGROUND / "output" / "llava-v1-tiny-mixlora", help="adapter folder"
    )
    made.add_argument(
        "--cache", type=Path, default=PLAYGROUND / "cache", help="data and base model (default: %(default)s)"
    )
    made.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    made.add_argument(
        "--trial", action="store_true", help="a few steps and questions only, to see that everything runs"
    )
    made.add_argument("flags", nargs="*", help="after --: further flags of llava.train.train")
    return made


if __name__ == "__main__":
    sys.exit(main())
