"""What MixLoRA costs beside LoRA: every variant in one process, taking turns; medians, and ratios within a round.

    python -m playground.benchmarks.benchmark layer|decode|train|all [--rounds 15] [--output FIGURES.json]
    python -m playground.benchmarks.benchmark gpu      # a LLaVA of 7B parameters on a GPU: see benchmark_gpu.py
    python -m playground.benchmarks.benchmark serve    # servers: see serving_speed.py
    python -m playground.benchmarks.benchmark launches # operations that an adapted layer starts: see launches.py
    python -m playground.benchmarks.benchmark show     # the stored figures as the Markdown tables of the README

`layer`: one linear layer, forward and backward, with the bytes that autograd keeps and the peak of allocated memory.
`decode`: one token through a Llama with a key-value cache. `train`: one whole training step of the playground's LLaVA
(needs its cache: run scripts/finetune_mixlora.sh once). *Launches* are the operations that a step starts, which is what
a GPU waits for when batches are small. Times are compared within one run only; machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava_mixlora import MixLoraError
from llava_mixlora.data.conversations import read_conversations
from llava_mixlora.inference.loading import load_for_inference
from llava_mixlora.inference.samples import training_data
from playground import PLAYGROUND
from playground.atomic import write_json
from playground.benchmarks import benchmark_gpu, launches, serving_speed
from playground.benchmarks.launches import launches_of
from playground.benchmarks.variants import (
    DEFAULT,
    FROZEN,
    MATERIALISED,
    MIXLORA,
    POOLS,
    REFERENCE,
    MaterialisedUpdate,
    adapters,
    measured,
)
from playground.measuring import Step, machine, peak_bytes, take_turns

INSTANCES = 4
LAYER_SHAPES = ((2048, 2048, 256), (2048, 5504, 256), (4096, 4096, 128))  # d_in, d_out, positions

Results = list[dict[str, Any]]


def main() -> int:
    """Command line: run, print a table, and merge the figures into a JSON file; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m playground.benchmarks.benchmark", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(
        dest="what", required=True, metavar="{layer,decode,train,all,gpu,launches,serve,show}"
    )
    for name in (*BENCHMARKS, "all"):
        command = commands.add_parser(name, help="all three" if name == "all" else BENCHMARKS[name].__doc__)
        command.add_argument("--rounds", type=int, default=15, help="timed rounds after three to warm up (default: 15)")
        command.add_argument("--output", type=Path, default=RESULTS, help="JSON to update (default: %(default)s)")
        command.set_defaults(run=run)
    benchmark_gpu.add_arguments(commands)
    launches.add_arguments(commands)
    serving_speed.add_arguments(commands)
    command = commands.add_parser("show", help="the stored figures as the tables of the README")
    command.set_defaults(run=show)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except MixLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Run the benchmarks that take a CPU, and put their figures into the file beside those of the others."""
    stored = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for name in BENCHMARKS if arguments.what == "all" else [arguments.what]:
        results = BENCHMARKS[name](arguments.rounds)
        stored[name] = {"machine": machine(), "rounds": arguments.rounds, "results": results}
        print(f"\n{name}\n{table(results)}")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, stored)
    print(f"\nwritten to {arguments.output}")


def show(arguments: argparse.Namespace) -> None:
    """Print every stored table."""
    if RESULTS.is_file():
        print(markdown(json.loads(RESULTS.read_text(encoding="utf-8"))))
    benchmark_gpu.show()
    serving_speed.show()


def layer(rounds: int) -> Results:
    """One adapted layer, forward and backward, on [4, S, d_in] in float32."""
    results: Results = []
    for d_in, d_out, positions in LAYER_SHAPES:
        x = torch.randn(INSTANCES, positions, d_in, requires_grad=True)
        for E, r in POOLS:
            variants = _layer_variants(d_in, d_out, E, r)

            steps = {name: partial(_step, module, x) for name, module in variants.items()}
            times = take_turns(steps, rounds, REFERENCE, f"{d_in}x{d_out}, E={E}")
            for name, module in variants.items():
                results.append(
                    {
                        "case": f"{d_in}x{d_out}, S={positions}, E={E}, r={r}",
                        "variant": name,
                        **times[name],
                        "launches": launches_of(steps[name]),
                        "saved_bytes": _saved_bytes(module, x),
                        "peak_bytes": _peak_bytes(module, x),
                    }
                )
    return _with_ratios(results, ("saved_bytes", "peak_bytes"))


def decode(rounds: int) -> Results:
    """One more token for each of four prompts of 64 tokens, with a cache; MixLoRA with the routes of the prompt."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, vocab_size=1000
    )
    results: Results = []
    prompt, token = torch.randint(0, 1000, (INSTANCES, 64)), torch.randint(0, 1000, (INSTANCES, 1))
    for E, r in POOLS:
        steps = {}
        for name, adapter in adapters(E, r).items():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).eval()
            model = model if adapter is None else get_peft_model(model, adapter).eval()
            with torch.inference_mode():
                cache = model(input_ids=prompt, use_cache=True).past_key_values

            def step(model: nn.Module = model, cache: Any = cache) -> None:
                with torch.inference_mode():
                    model(input_ids=token, past_key_values=cache, use_cache=True)
                cache.crop(-1)  # the token is forgotten, so that every round decodes the same position

            steps[name] = step
        times = take_turns(steps, 4 * rounds, REFERENCE, f"decode, E={E}")
        results += _rows(f"decode, E={E}, r={r}", steps, times)
    return results


def train(rounds: int) -> Results:
    """A training step (forward, backward, AdamW) of the playground's LLaVA on a batch of its training data."""
    from llava_mixlora import patches

    patches.apply()
    steps = {}
    for name, adapter in adapters(16, 4).items():
        if adapter is None:
            continue  # a frozen model has no training step
        model, batch = _playground_model(adapter)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step(model: nn.Module = model, batch: dict[str, Tensor] = batch, optimizer: Any = optimizer) -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        steps[name] = step
    times = take_turns(steps, rounds, REFERENCE, "training step")
    return _rows("training step, playground LLaVA, batch 48, E=16, r=4", steps, times)


def _rows(case: str, steps: dict[str, Step], times: dict[str, dict[str, float]]) -> Results:
    counts = {name: launches_of(step) for name, step in steps.items()}
    return [{"case": case, "variant": name, **times[name], "launches": counts[name]} for name in steps]


RESULTS = PLAYGROUND / "results" / "benchmark_cpu.json"
BENCHMARKS: dict[str, Callable[[int], Results]] = {"layer": layer, "decode": decode, "train": train}


def table(results: Results) -> str:
    """The results as text, one line each."""
    lines = [f"{'case':<52} {'variant':<18} {'ms':>9} {'vs LoRA r=E':>12} {'launches':>9} {'saved':>7} {'peak':>7}"]
    for row in results:
        ratios = [f"{row[key]:.2f}x" if key in row else "" for key in ("saved_bytes_ratio", "peak_bytes_ratio")]
        lines.append(
            f"{row['case']:<52} {row['variant']:<18} {row['milliseconds']:>9.2f} "
            f"{row['milliseconds_ratio']:>11.2f}x {row['launches']:>9} {ratios[0]:>7} {ratios[1]:>7}"
        )
    return "\n".join(lines)


def markdown(stored: dict[str, Any]) -> str:
    """The contents of the JSON file as a Markdown table: a line per case, times and bytes in units of LoRA r=E's."""
    by_case: dict[str, dict[str, Any]] = {}
    for benchmark in stored.values():
        for row in benchmark["results"]:
            by_case.setdefault(row["case"], {})[row["variant"]] = row
    variants = measured([FROZEN, "LoRA r", *MIXLORA, MATERIALISED], by_case.values())
    lines = [
        f"| case | {REFERENCE} | {' | '.join(variants)} | ifs_cfs: saved | ifs_cfs: peak |",
        "| --- |" + " --- |" * (len(variants) + 3),
    ]
    for case, rows in by_case.items():
        cells = [f"{rows[REFERENCE]['milliseconds']:.1f} ms"]
        cells += [f"{rows[name]['milliseconds_ratio']:.2f}" if name in rows else "" for name in variants]
        bytes_of = rows["MixLoRA ifs_cfs"]
        cells += [
            f"{bytes_of[key]:.2f}" if key in bytes_of else "" for key in ("saved_bytes_ratio", "peak_bytes_ratio")
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _layer_variants(d_in: int, d_out: int, E: int, r: int) -> dict[str, nn.Module]:
    class OneLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q_proj = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x)

    variants: dict[str, nn.Module] = {}
    for name, adapter in adapters(E, r).items():
        if name == DEFAULT:
            continue  # a layer by itself has no words
        if adapter is not None:
            adapter.task_type, adapter.target_modules = None, {"q_proj"}
        variants[name] = OneLayer() if adapter is None else get_peft_model(OneLayer(), adapter)
    return {**variants, MATERIALISED: MaterialisedUpdate(OneLayer().q_proj, E, r, INSTANCES)}


def _playground_model(adapter: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    cache = PLAYGROUND / "cache"
    loaded = load_for_inference(cache / "llava-v1-tiny")
    samples = read_conversations(cache / "data" / "train.json")[:48]
    dataset, collate = training_data(samples, loaded, cache / "data" / "images", "llava_v1")
    batch = collate([dataset[number] for number in range(len(samples))])
    adapter.exclude_modules = r".*(mm_projector|vision_tower).*"
    model = get_peft_model(loaded[1], adapter).train()
    for parameter in model.get_model().mm_projector.parameters():
        parameter.requires_grad = True  # upstream's LoRA runs train the projector too
    return model, batch


def _saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of `module(x)`: the input and intermediates, not parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        output = module(x)  # kept alive until all is counted, so that no address is used twice
    total = sum(kept.values())
    del output
    return total


def _step(module: nn.Module, x: Tensor) -> None:
    _forget_gradients(module, x)
    module(x).sum().backward()


def _forget_gradients(module: nn.Module, x: Tensor) -> None:
    x.grad = None
    module.zero_grad(set_to_none=True)


def _peak_bytes(module: nn.Module, x: Tensor) -> int:
    """What a step allocates at most: activations, what the backward pass needs for a moment, and all gradients."""
    _forget_gradients(module, x)  # before, or freeing the last step's would count against this one
    return peak_bytes(lambda: module(x).sum().backward(), x.device)


def _with_ratios(results: Results, keys: tuple[str, ...]) -> Results:
    reference = {row["case"]: row for row in results if row["variant"] == REFERENCE}
    for row in results:
        for key in keys:
            row[f"{key}_ratio"] = round(row[key] / reference[row["case"]][key], 3)
    return results


if __name__ == "__main__":
    sys.exit(main())
