"""Beside upstream's train(): TRL's SFTTrainer from the same adapter, on the same batches, and both losses of each step.

`python -m playground.recipes.beside_upstream`, once `bash scripts/finetune_mixlora.sh` has made data and base. Where
the base knows no token <image>, transformers' has one more row in its head, a copy of <unk>'s: a softmax over one score
more, whose loss is higher by log(1 + p), p being the probability of <unk>.
"""

import json
from itertools import cycle, islice
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import set_seed

from llava_mixlora.native.import_hf import import_hf
from llava_mixlora.native.names import upstream_name
from playground.atomic import atomic_directory, write_json
from playground.base import tiny_base
from playground.recipes import native_llava, trl_sft


def main(words: list[str] | None = None) -> None:
    """Train twice as the command line says, and print what differs."""
    parser = native_llava.parser(__doc__, "beside-upstream", steps=20)
    given = parser.parse_args(words)
    native_llava.check(given, parser)

    samples = list(islice(cycle(native_llava.samples(given.data)), given.steps * given.batch_size))
    native_llava.export(given.base, given.native)
    with atomic_directory(given.output, "data.json") as folder:
        set_seed(0)
        native_llava.adapted(native_llava.load(given.native)[0]).save_pretrained(folder / "start")
        import_hf(folder / "start", folder / "llava-start", str(given.base))
        write_json(folder / "data.json", samples)
    data, of_upstream, of_trl = (given.output / name for name in ("data.json", "llava-upstream", "trl"))
    tiny_base.train(
        {
            "mixlora_enable": True,
            "mixlora_init_from": given.output / "llava-start",
            "model_name_or_path": given.base,
            "vision_tower": json.loads((given.base / "config.json").read_text())["mm_vision_tower"],
            "data_path": data,
            "image_folder": given.images,
            "output_dir": of_upstream,
            "per_device_train_batch_size": given.batch_size,
            "warmup_ratio": 0.0,
            **native_llava.settings(given),
        }
    )
    places = {"--data": data, "--images": given.images, "--native": given.native, "--output": of_trl}
    pace = {"--steps": given.steps, "--optim": given.optim, "--learning-rate": given.learning_rate}
    start = {"--base": given.base, "--init-from": given.output / "start", "--batch-size": given.batch_size}
    trl_sft.main(["--half-tower", *(str(word) for pair in {**places, **pace, **start}.items() for word in pair)])
    show(of_upstream, of_trl)


def show(of_upstream: Path, of_trl: Path) -> None:
    """Print the losses of both runs, and how far their adapters are apart."""
    pairs = list(zip(losses(of_upstream), losses(of_trl), strict=True))
    print("\nstep  upstream's train()  TRL's SFTTrainer  difference")
    for step, (one, other) in enumerate(pairs, start=1):
        print(f"{step:4}  {one:18.6f}  {other:16.6f}  {other - one:+.1e}")
    print(f"largest difference of a loss: {max(abs(other - one) for one, other in pairs):.1e}")
    upstream, native = (load_file(folder / SAFETENSORS_WEIGHTS_NAME) for folder in (of_upstream, of_trl))
    prefix = "base_model.model."
    native = {prefix + upstream_name(name.removeprefix(prefix)): tensor for name, tensor in native.items()}
    counts = [name for name in upstream if "stats_usage" in name]
    same = all(torch.equal(upstream[name], native[name]) for name in counts)
    print(f"all {len(counts)} layers chose each factor equally often: {same}")
    trained = [name for name in upstream if ".mixlora_A" in name or ".mixlora_B" in name or ".mixlora_router" in name]
    apart = max((upstream[name] - native[name]).abs().max().item() for name in trained)
    print(f"largest difference of a trained number: {apart:.1e}")


def losses(folder: Path) -> list[float]:
    """That of each step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


if __name__ == "__main__":
    main()
