"""The console script `llava-mixlora`, also `python -m llava_mixlora`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, import_error
from .errors import MixLoraError

# deepspeed and torch's old launcher put the rank right behind the program: before our subcommand, not the script.
LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    launcher_flags = []
    while argv and LOCAL_RANK.fullmatch(argv[0]):
        launcher_flags.append(argv.pop(0))
    try:
        if argv[:1] == ["run"] and argv[1:2] not in (["-h"], ["--help"]):
            _check_imported()
            return _run(launcher_flags, argv[1:])  # argparse would take the script's flags for ours
        arguments = _parser().parse_args(argv)
        if arguments.command is not _doctor:
            _check_imported()
        return _answer(arguments)
    except MixLoraError as error:
        print(f"llava-mixlora: error: {error}", file=sys.stderr)
        return 1


def _answer(arguments: argparse.Namespace) -> int:
    """Run a subcommand that prints; returns its status, or a shell's for a reader that went away, as `head` does."""
    try:
        status = arguments.command(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 128 + signal.SIGPIPE


def _check_imported() -> None:
    if import_error is not None:
        reason = (str(import_error).splitlines() or [type(import_error).__name__])[0]
        raise MixLoraError(f"{reason}; `llava-mixlora doctor` tells what is missing and the command that mends it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-mixlora", description="MixLoRA for the LLaVA that is installed here.")
    parser.add_argument("--version", action="version", version=f"llava-mixlora {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser(
        "run",
        help="run a LLaVA entry point with the plugin active",
        usage="llava-mixlora run [-h] (-m MODULE | SCRIPT.py) [ARGS ...]",
        description="Run a LLaVA entry point, unchanged, with the plugin active. Under a launcher: "
        "deepspeed --module llava_mixlora run ..., torchrun -m llava_mixlora run ...",
        epilog="example: llava-mixlora run -m llava.serve.cli --model-path OUT --image-file IMG --device cpu",
    )
    converting = _add_command(
        commands,
        _convert,
        "turn a checkpoint of the authors' code into an adapter",
        "Turn a checkpoint of the authors' released code (VT-NLP/MixLoRA) into a PEFT adapter for LLaVA. No pickled "
        "code is executed.",
        "llava-mixlora convert their/checkpoint --model-base lmsys/vicuna-7b-v1.3 --output llava-mixlora-converted",
    )
    converting.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with pytorch_model.bin and cmoa_args.bin")
    converting.add_argument("--model-base", required=True, metavar="BASE", help="the LLM that training started from")
    converting.add_argument("--output", required=True, metavar="OUT", help="new folder for the adapter")
    converting.add_argument("--vision-tower", metavar="PATH", help="tower to name instead of the checkpoint's")
    inspecting = _add_command(
        commands,
        _inspect,
        "show what an adapter is and how its routers used the factors",
        "Print an adapter's configuration, its parameters by kind, and per layer how its routers used the factors in "
        "training: entropy of the choices (1: all alike), dead (share of factors never chosen) and balance (share of "
        "the pool in effective use), for pools A and B.",
        "llava-mixlora inspect output/llava-mixlora",
    )
    inspecting.add_argument("adapter", metavar="ADAPTER", help="folder with adapter_config.json")
    plotting = _add_command(
        commands,
        _plot,
        "draw how an adapter's routers used the factors",
        "Draw which share of the choices each factor got in training, per layer and pool. With --data, draw for each "
        "task of the data which factors its prompts choose, a map of the routes, and how alike the tasks are. Needs "
        "matplotlib, and scikit-learn for the map.",
        "llava-mixlora plot output/llava-mixlora --output usage.png",
    )
    plotting.add_argument("adapter", metavar="ADAPTER", help="folder with adapter_config.json")
    plotting.add_argument(
        "--output", help="picture to write, with --data a folder (default: ADAPTER/usage.png, ADAPTER/routes)"
    )
    plotting.add_argument("--data", metavar="DATA", help="LLaVA's training data with fields 'task'")
    plotting.add_argument("--image-folder", metavar="DIR", help="where the images of DATA lie")
    plotting.add_argument("--samples", type=_positive, default=32, help="how many of each task (default: 32)")
    plotting.add_argument("--version", default="v1", help="conversation template, as in training (default: v1)")
    plotting.add_argument("--model-base", metavar="BASE", help="the adapter's base (default: the one that it names)")
    _add_doctor(commands)
    _add_merge(commands)
    _add_eval(commands)
    _add_interference(commands)
    return parser


def _add_doctor(commands: Any) -> None:
    doctoring = _add_command(
        commands,
        _doctor,
        "tell what works here, or how much memory a run will need",
        "Tell which versions are installed, what works with them on this machine, and the command that mends what does "
        "not. Status 1: the main job (scripts/finetune_mixlora.sh) cannot run. With --estimate, tell before a run how "
        "many parameters it trains and how much memory it needs on each GPU, for 16, 8 and 4 bits and every ZeRO "
        "stage. No weights are loaded.",
        "llava-mixlora doctor; llava-mixlora doctor --estimate liuhaotian/llava-v1.5-7b --batch-size 4 --gpus 8",
    )
    doctoring.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    doctoring.add_argument(
        "--estimate", metavar="MODEL_CONFIG", help="model folder, config.json, or name on the hub; for the flags below"
    )
    before = set(vars(doctoring.parse_args([])))
    doctoring.add_argument("--bits", type=int, help="16, 8 or 4: only that (default: all three)")
    doctoring.add_argument("--num-factors", type=int, default=16, help="factors in each pool (16)")
    doctoring.add_argument("--r", type=int, default=4, help="factors chosen per instance (4)")
    doctoring.add_argument("--lora-dropout", type=float, default=0.05, help="dropout on the input of pool A (0.05)")
    doctoring.add_argument("--routing", default="ifs_cfs", help="ifs_cfs (default), ifs or random")
    doctoring.add_argument("--router-gradient", default="straight_through", help="straight_through (default) or none")
    doctoring.add_argument("--batch-size", type=int, default=16, help="instances per GPU and step (16)")
    doctoring.add_argument(
        "--sequence-length", type=int, default=2048, help="tokens of an instance, those of its image included (2048)"
    )
    doctoring.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="on by default"
    )
    doctoring.add_argument("--gpus", type=int, default=1, help="over which ZeRO divides (1)")
    doctoring.add_argument("--optimizer", default="adamw", help="adamw (default) or paged_adamw_8bit")
    doctoring.add_argument("--compute-dtype", default="bf16", help="bf16 (default) or fp32")
    doctoring.add_argument(
        "--vision-tower",
        metavar="PATH",
        help="folder or name of the CLIP tower; none: text only (default: the model's)",
    )
    describing = {name: value for name, value in vars(doctoring.parse_args([])).items() if name not in before}
    doctoring.set_defaults(describing=describing)


def _add_merge(commands: Any) -> None:
    merging = _add_command(
        commands,
        _merge,
        "merge an adapter into its base: one checkpoint that needs no plugin",
        "Write the base with a static stand-in for the adapter in it, as a plain LLaVA checkpoint, and report how far "
        "it is from the dynamic model. By default it is made from the statistics that training has saved.",
        "llava-mixlora merge --model-path output/llava-mixlora --model-base liuhaotian/llava-v1.5-7b "
        "--save-model-path llava-merged",
    )
    exporting = _add_command(
        commands,
        _export_lora,
        "turn an adapter into a plain LoRA of PEFT",
        "Write a static stand-in for the adapter as a LoRA of rank E, for PEFT and for LLaVA's own LoRA branch, and "
        "report how far it is from the dynamic model.",
        "llava-mixlora export-lora --model-path output/llava-mixlora --save-model-path llava-exported-lora",
    )
    for parser in (merging, exporting):
        parser.add_argument("--model-path", required=True, metavar="ADAPTER", help="folder of the MixLoRA adapter")
        parser.add_argument("--model-base", metavar="BASE", help="its base in 16 bits (default: the one that it names)")
        parser.add_argument("--save-model-path", required=True, metavar="OUT", help="new folder for the result")
        parser.add_argument(
            "--method",
            default="lstsq",
            choices=("mean", "lstsq", "regression"),
            help="how the static update is chosen (default: lstsq); regression is the nearest, and needs --calibration",
        )
        parser.add_argument("--calibration", metavar="DATA", help="conversations (LLaVA's JSON) to make it from")
        parser.add_argument("--image-folder", metavar="DIR", help="where the images of DATA lie")
        parser.add_argument("--task", metavar="NAME", help="only samples of DATA whose field 'task' is NAME")
        parser.add_argument("--samples", type=int, default=512, help="how many to draw from DATA (default: 512)")
        parser.add_argument("--version", default="v1", help="conversation template, as in training (default: v1)")
        parser.add_argument("--batch-size", type=int, default=8, help="samples at a time (default: 8)")


def _add_eval(commands: Any) -> None:
    evaluating = _add_command(
        commands,
        _eval,
        "answer the questions of a benchmark, and score the answers",
        "Ask a model (a MixLoRA adapter, LLaVA's own LoRA or a whole LLaVA) all questions of a benchmark, in batches, "
        "and score its answers. An interrupted run goes on where it stopped; under torchrun or accelerate launch the "
        "processes share the questions.",
        "llava-mixlora eval --model-path output/llava-mixlora --questions mm_tasks/text_vqa.jsonl --output scores",
    )
    evaluating.add_argument("--model-path", required=True, metavar="MODEL", help="folder of the adapter or model")
    evaluating.add_argument("--model-base", metavar="BASE", help="the adapter's base (default: the one that it names)")
    evaluating.add_argument(
        "--questions",
        required=True,
        metavar="PATH",
        help="the authors' JSON Lines, LLaVA's question file or training data, a folder of such files, or MME's folder",
    )
    evaluating.add_argument("--output", required=True, metavar="DIR", help="folder for answers and scores")
    evaluating.add_argument("--image-folder", metavar="DIR", help="where images lie (default: beside the questions)")
    evaluating.add_argument(
        "--task", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
    )
    evaluating.add_argument("--limit", type=_positive, metavar="N", help="at most so many questions of each task")
    evaluating.add_argument("--batch-size", type=_positive, default=16, help="questions at a time (default: 16)")
    evaluating.add_argument("--max-new-tokens", type=_positive, default=128, help="longest answer (default: 128)")
    evaluating.add_argument("--conv-mode", default="llava_v1", help="conversation template (default: llava_v1)")
    evaluating.add_argument("--bits", type=int, default=16, choices=(16, 8, 4), help="8 or 4: quantize the model")
    evaluating.add_argument("--judge", metavar="LM", help="a causal language model that decides what is right as well")


def _add_interference(commands: Any) -> None:
    measuring = _add_command(
        commands,
        _interference,
        "measure how much the tasks of a MixLoRA or LoRA adapter interfere",
        "For each pair of tasks, and for A and B of each layer: what a gradient step on the one does to the other's "
        "loss, in units of what the other's own step does. 1: as good; 0: nothing; below 0: harm. Measure a checkpoint "
        "from the middle of training, on data that is not trained on. Needs matplotlib for the heatmaps.",
        "llava-mixlora interference output/llava-mixlora/checkpoint-100 --data heldout.json --image-folder images",
    )
    measuring.add_argument("adapter", metavar="ADAPTER", help="folder of a MixLoRA adapter, or of LLaVA's own LoRA")
    measuring.add_argument("--data", required=True, metavar="DATA", help="LLaVA's training data with fields 'task'")
    measuring.add_argument("--image-folder", metavar="DIR", help="where the images of DATA lie")
    measuring.add_argument("--samples", type=_positive, default=64, help="how many of each task (default: 64)")
    measuring.add_argument("--batch-size", type=_positive, default=8, help="samples of a gradient (default: 8)")
    measuring.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="only these (default: all)")
    measuring.add_argument(
        "--layers", nargs="+", default=[], metavar="NAME", help="only layers with one of these in their name: layers.0"
    )
    measuring.add_argument(
        "--estimator",
        default="ratio-of-means",
        choices=("ratio-of-means", "mean-of-ratios"),
        help="where the mean over batches is taken: of both losses' changes (default), or of their ratio as in the "
        "paper, which one batch can decide whose own loss hardly changes",
    )
    measuring.add_argument("--seed", type=int, default=0, help="of the choice of samples (default: 0)")
    measuring.add_argument("--version", default="v1", help="conversation template, as in training (default: v1)")
    measuring.add_argument("--model-base", metavar="BASE", help="the adapter's base (default: the one that it names)")
    measuring.add_argument(
        "--output", metavar="DIR", help="folder for interference.json and .png (default: ADAPTER/interference)"
    )


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word}: expected a whole number of at least 1")
    return number


def _add_command(commands: Any, command: Callable[..., int | None], help: str, description: str, example: str) -> Any:
    parser = commands.add_parser(
        command.__name__.strip("_").replace("_", "-"), help=help, description=description, epilog=f"example: {example}"
    )
    parser.set_defaults(command=command)
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    from .adapters.convert import convert  # importing torch takes seconds that --help need not wait for

    convert(arguments.checkpoint, arguments.model_base, arguments.output, arguments.vision_tower)
    print(f"Wrote the adapter to {arguments.output}. Talk to it, once its base has a tokenizer:")
    print(f"  llava-mixlora run -m llava.serve.cli --model-path {arguments.output} --image-file IMAGE")


def _run(launcher_flags: list[str], words: list[str]) -> int:
    as_module = words[:1] == ["-m"]
    words = words[1:] if as_module else words
    if not words:
        raise MixLoraError("run: nothing to run; expected -m MODULE or SCRIPT.py, such as -m llava.train.train_mem")
    from .launch import run  # importing LLaVA's stack takes seconds that --help need not wait for

    run(words[0], launcher_flags + words[1:], as_module)
    return 0


def _inspect(arguments: argparse.Namespace) -> None:
    from .adapters.inspect_adapter import describe

    print("\n".join(describe(arguments.adapter)))


def _plot(arguments: argparse.Namespace) -> None:
    if arguments.data is not None:
        _plot_routes(arguments)
        return
    from .analysis.plot_usage import plot

    output = arguments.output or os.path.join(arguments.adapter, "usage.png")
    plot(arguments.adapter, output)
    print(f"Wrote {output}")


def _plot_routes(given: argparse.Namespace) -> None:
    from .analysis.task_routes import draw_task_routes, task_routes
    from .merging.calibration import CalibrationData

    data = CalibrationData(given.data, given.image_folder, samples=given.samples, version=given.version)
    output = Path(given.output or os.path.join(given.adapter, "routes"))
    draw_task_routes(task_routes(given.adapter, given.model_base, data), output)
    print(f"Wrote routes.json and three pictures to {output}")


def _merge(arguments: argparse.Namespace) -> None:
    from .merging.merge import merge

    print("\n".join(merge(*_merge_arguments(arguments)).lines()))
    print(f"Wrote {arguments.save_model_path}, with merge_report.json. LLaVA loads it as it is, with no --model-base.")


def _export_lora(arguments: argparse.Namespace) -> None:
    from .merging.merge import export_lora

    print("\n".join(export_lora(*_merge_arguments(arguments)).lines()))
    print(f"Wrote {arguments.save_model_path}, with merge_report.json. It is a LoRA for the same base.")


def _merge_arguments(arguments: argparse.Namespace) -> tuple[Any, ...]:
    from .merging.calibration import CalibrationData

    given = arguments
    calibration = None
    if given.calibration is not None:
        calibration = CalibrationData(
            given.calibration, given.image_folder, given.task, given.samples, given.version, given.batch_size
        )
    elif given.task is not None:
        raise MixLoraError(f"--task {given.task} chooses among the samples of --calibration DATA, which is missing")
    return given.model_path, given.model_base, given.save_model_path, given.method, calibration


def _eval(arguments: argparse.Namespace) -> None:
    from .evaluation.questions import read_questions

    given = arguments
    questions = read_questions(given.questions, given.image_folder, given.task, given.limit)
    from .evaluation.evaluate import Asking, evaluate, table

    asking = Asking(given.model_path, given.model_base, given.conv_mode, given.max_new_tokens, given.bits)
    result = evaluate(asking, questions, Path(given.output), given.batch_size, given.judge)
    if result is not None:
        print(table(result))
        print(f"\nWrote answers.jsonl, scores.json and scores.md to {given.output}")


def _interference(arguments: argparse.Namespace) -> None:
    from .analysis.interference import interference
    from .merging.calibration import CalibrationData
    from .preflight import check_model_path, check_writable

    given = arguments
    check_model_path("ADAPTER", given.adapter)
    output = given.output or os.path.join(given.adapter, "interference")
    check_writable(output, "--output")
    data = CalibrationData(
        given.data, given.image_folder, samples=given.samples, version=given.version, batch_size=given.batch_size
    )
    found = interference(given.adapter, given.model_base, data, given.tasks, given.layers, given.estimator, given.seed)
    found.save(Path(output))
    print("\n".join(found.lines()))
    print(f"Wrote interference.json and interference.png to {output}")


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.estimate is None:
        for name, default in arguments.describing.items():
            if getattr(arguments, name) != default:
                flag = "--" + name.replace("_", "-")
                raise MixLoraError(
                    f"{flag} {getattr(arguments, name)} describes a run for --estimate MODEL, which is missing"
                )
        from .diagnosis.doctor import examine

        examination = examine()
        print(json.dumps(examination.as_json(), indent=1) if arguments.json else "\n".join(examination.lines()))
        return 0 if examination.main_job else 1
    _check_imported()
    _estimate(arguments)
    return 0


def _estimate(arguments: argparse.Namespace) -> None:
    from .diagnosis.memory_estimate import BITS, RunSettings, estimate, read_model_config
    from .diagnosis.memory_report import as_json, describe

    names = [field.name for field in dataclasses.fields(RunSettings)]
    settings = RunSettings(**{name: getattr(arguments, name) for name in names})
    bits = BITS if arguments.bits is None else (arguments.bits,)
    result = estimate(read_model_config(arguments.estimate, arguments.vision_tower), settings, bits)
    if arguments.json:
        print(json.dumps(as_json(arguments.estimate, result), indent=1))
    else:
        print("\n".join(describe(arguments.estimate, result)))
