"""Training, decoding and loading a LLaVA of 7B parameters, MixLoRA beside LoRA.

    python -m playground.benchmarks.benchmark gpu

The weights are random and made on the device, so nothing is downloaded: a Llama-7B, a CLIP-L tower, 576 image tokens
and 200 of text, in bfloat16 and then on 4-bit weights. All variants share one base model, take turns in one process,
and are compared with PEFT's LoRA of rank E in the same round:

- training: one step of upstream's model (tower, projector, forward, backward, AdamW), with and without gradient
  checkpointing: time, the most memory that this variant would need alone, and what the profiler saw of one step;
- decoding: one more token for 1 and for 16 instances, with a cache and held routes;
- loading: `PeftModel.from_pretrained` of a saved adapter, whose file was read before (the disk is not measured).

Every case is written to the JSON file when it is measured, and the same command goes on after the last one that is
there. `--size narrow` has the depth of 7B in a width of 64: nearly all that it takes is starting operations, which is
what the processor in front of a GPU does, and so it tells something on a machine without one.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_mixlora import MixLoraError
from llava_mixlora.diagnosis.memory_estimate import CLIP_LARGE_336_SIZES
from playground import PLAYGROUND
from playground.benchmarks.gpu_report import goals, markdown, table
from playground.benchmarks.variants import FROZEN, MATERIALISED, POOLS, REFERENCE, MaterialisedUpdate, adapters
from playground.measuring import Step, clock_of, machine, peak_bytes, processor_clock, profile_of, take_turns
from playground.notes import Notes

IMAGE_TOKEN_INDEX, IGNORE_INDEX = -200, -100
WEIGHTS = ("bf16", "nf4")
PARTS = ("train", "decode", "load")
DECODED_TOGETHER = (1, 16)
LOADS = 3  # of each adapter, after one that is not counted

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A LLaVA's shape: sizes of the language model and of the tower, and how many tokens of text follow an image."""

    language: dict[str, int]
    tower: dict[str, int]
    text_tokens: int


SIZES = {
    "7b": Size(
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
        },
        CLIP_LARGE_336_SIZES,
        text_tokens=200,
    ),
    "narrow": Size(
        {
            "vocab_size": 1000,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 32,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        text_tokens=16,
    ),
}


def add_arguments(commands: Any) -> None:
    """Add the command `gpu` to argparse's `commands`."""
    command = commands.add_parser(
        "gpu",
        help="a LLaVA of 7B parameters on a GPU: training, decoding, loading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--size", choices=SIZES, default="7b", help="the shape of the model (default: %(default)s)")
    command.add_argument("--layers", type=int, help="decoder layers, to fit a smaller GPU (default: all)")
    command.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU; for --size narrow any)")
    command.add_argument(
        "--batch-size", type=int, default=4, help="instances of a training step (default: %(default)s)"
    )
    command.add_argument("--rounds", type=int, default=20, help="timed rounds after three to warm up (default: 20)")
    command.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS, help="of the base (default: both)")
    command.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    command.add_argument("--output", type=Path, help="JSON to write (default: playground/results/benchmark_SIZE.json)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure what the file lacks, and print everything.

    Raises:
        MixLoraError: there is no such device, a number is out of range, or a case does not fit into the memory.
    """
    device = _device(arguments)
    for name in ("layers", "batch_size", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise MixLoraError(f"--{name.replace('_', '-')} {value}: expected a whole number of at least 1")
    settings = {
        "machine": {key: value for key, value in machine(device).items() if key != "date"},
        **{name: getattr(arguments, name) for name in ("size", "layers", "batch_size", "rounds")},
    }
    notes = Notes(arguments.output or results_file(arguments.size), settings)
    for weights in arguments.weights:
        cases = [
            (f"{weights} {case}", measure)
            for part in PARTS
            if part in arguments.parts
            for case, measure in CASES[part](arguments, device).items()
        ]
        missing = [(case, measure) for case, measure in cases if not notes.has(case)]
        if not missing:
            continue
        llava = make_llava(SIZES[arguments.size], arguments.layers, weights, device)
        for case, measure in missing:
            try:
                rows = measure(llava)
            except torch.OutOfMemoryError:
                raise MixLoraError(f"{case}: does not fit into the memory of {device}; lower --layers") from None
            notes.add(case, {"date": machine()["date"], "rows": rows})
            print(f"\n{case}\n{table(rows)}", flush=True)
        del llava
        _free()
    print("\n".join(["", *goals(notes.settings, notes.taken)]))
    print(f"\nwritten to {notes.file}")


def show() -> None:
    """Print the stored figures of every size as Markdown."""
    for size in SIZES:
        if (file := results_file(size)).is_file():
            notes = Notes.read(file)
            print(f"\n{markdown(notes.taken)}\n")
            print("\n".join(goals(notes.settings, notes.taken)))


def results_file(size: str) -> Path:
    """Where the figures of a size are kept."""
    return PLAYGROUND / "results" / f"benchmark_{'gpu' if size == '7b' else size}.json"


def make_llava(size: Size, layers: int | None, weights: str, device: torch.device) -> nn.Module:
    """An upstream LLaVA with random weights on a device, frozen, its tower loaded; `layers` cuts the decoder short."""
    from llava_mixlora import patches

    patches.apply()
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    torch.manual_seed(0)
    depth = {} if layers is None else {"num_hidden_layers": layers}
    with tempfile.TemporaryDirectory() as folder, _made_on(device, torch.bfloat16):
        tower_config = CLIPVisionConfig(**size.tower)
        tower_config.save_pretrained(folder)  # upstream reads the sizes of a tower from its folder
        config = LlavaConfig(
            **{**size.language, **depth},
            mm_vision_tower=folder,
            mm_projector_type="mlp2x_gelu",
            mm_hidden_size=tower_config.hidden_size,
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            mm_use_im_start_end=False,
            mm_use_im_patch_token=False,
            use_mm_proj=True,
            pretraining_tp=1,
            pad_token_id=0,
        )
        model = LlavaLlamaForCausalLM(config)
        tower = model.get_vision_tower()
        tower.vision_tower = CLIPVisionModel(tower_config)
        tower.is_loaded = True
    model.requires_grad_(False)
    if weights == "nf4":
        _quantize(model.model.layers, device)
    return model


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _quantize(layers: nn.Module, device: torch.device) -> None:
    """Replace linear layers by bitsandbytes' 4-bit ones, as upstream's `--bits 4`: nf4, its scales quantized too."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in layers.modules():
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                stored = Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta"
                )
                stored.weight = Params4bit(
                    linear.weight.data.cpu() if device.type == "cpu" else linear.weight.data,
                    requires_grad=False,
                    quant_type="nf4",
                    compress_statistics=True,
                )
                setattr(parent, name, stored.to(device))


def is_quantized(llava: nn.Module) -> bool:
    """Whether the decoder's weights are 4-bit ones."""
    return any(hasattr(parameter, "quant_state") for parameter in llava.model.layers.parameters())


def sharing_copy(llava: nn.Module) -> nn.Module:
    """A model of its own around the same base weights; the projector, which trains, is copied."""
    own = set(llava.get_model().mm_projector.parameters())
    shared: list[Any] = [parameter for parameter in llava.parameters() if parameter not in own]
    shared += [weight.quant_state for weight in shared if hasattr(weight, "quant_state")]
    return copy.deepcopy(llava, {id(each): each for each in shared})


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """What a model takes between two steps: weights, constants of quantized ones, buffers and the optimizer's state."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in [getattr(parameter, "quant_state", None) for parameter in model.parameters()]:
        tensors += _tensors_in(state)
    if optimizer is not None:
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())


def _tensors_in(quant_state: Any) -> list[Tensor]:
    if quant_state is None:
        return []
    values = vars(quant_state)
    return [v for v in values.values() if isinstance(v, Tensor)] + _tensors_in(values.get("state2"))


def _training_cases(arguments: argparse.Namespace, device: torch.device) -> dict[str, Callable[[nn.Module], list[Row]]]:
    return {
        f"train, checkpointing {'on' if checkpointing else 'off'}, E={E}, r={r}": (
            lambda llava, E=E, r=r, checkpointing=checkpointing: _train(llava, E, r, checkpointing, arguments, device)
        )
        for checkpointing in (True, False)
        for E, r in POOLS
    }


def _train(
    llava: nn.Module, E: int, r: int, checkpointing: bool, arguments: argparse.Namespace, device: torch.device
) -> list[Row]:
    batch = _batch(SIZES[arguments.size], arguments.batch_size, device)
    kinds = {name: config for name, config in adapters(E, r).items() if name != "LoRA r"} | {MATERIALISED: None}

    def prepare(name: str) -> tuple[Step, Row]:
        model, optimizer = _trainable(llava, name, kinds[name], E, r, checkpointing, arguments.batch_size)
        step = _training_step(model, optimizer, batch, device)
        step()  # makes the optimizer's state
        needed = resident_bytes(model, optimizer) + peak_bytes(step, device)
        return step, {"variant": name, "peak_bytes": needed, "profile": profile_of(step, device)}

    steps: dict[str, Step] = {}
    rows: dict[str, Row] = {}
    for name in kinds:
        try:
            steps[name], rows[name] = prepare(name)
        except torch.OutOfMemoryError:
            rows[name] = {"variant": name, "out_of_memory": True}
        _free()  # what a variant that did not fit has left
    if REFERENCE not in steps:
        raise MixLoraError(
            f"{REFERENCE}: a step with {arguments.batch_size} instances does not fit into the memory of {device}; "
            "lower --batch-size or --layers"
        )
    for name, times in take_turns(steps, arguments.rounds, REFERENCE, f"E={E}", clock_of(device)).items():
        rows[name] |= times
        rows[name]["peak_bytes_ratio"] = round(rows[name]["peak_bytes"] / rows[REFERENCE]["peak_bytes"], 3)
    return list(rows.values())


def _trainable(
    llava: nn.Module, name: str, adapter: Any, E: int, r: int, checkpointing: bool, instances: int
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """A variant as upstream's train() prepares it, with its optimizer; the frozen base has none."""
    model = sharing_copy(llava)
    model.config.use_cache = False
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable()
    if name == MATERIALISED:
        _materialise(model, E, r, instances)
    elif adapter is not None:
        model = _adapted(model, adapter, autocast_adapter_dtype=True)
    model.train()
    if name == FROZEN:
        return model, None
    owner = model if name == MATERIALISED else model.get_base_model()
    owner.get_model().mm_projector.requires_grad_(True)  # upstream's LoRA runs train the projector too
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, _optimizer(trained, is_quantized(llava))


def _optimizer(trained: list[nn.Parameter], quantized: bool) -> torch.optim.Optimizer:
    """AdamW, beside 4-bit weights with its state in 8 bits, as QLoRA does; bitsandbytes has that for GPUs only."""
    on_gpu = trained[0].device.type == "cuda"
    if quantized and on_gpu:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=1e-4)
    return torch.optim.AdamW(trained, lr=1e-4, fused=on_gpu)


def _materialise(model: nn.Module, E: int, r: int, instances: int) -> None:
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if hasattr(linear, "in_features"):
                    setattr(parent, name, MaterialisedUpdate(linear, E, r, instances))


def _adapted(model: nn.Module, adapter: Any, autocast_adapter_dtype: bool) -> PeftModel:
    adapter.exclude_modules = r".*(mm_projector|vision_tower).*"
    return get_peft_model(model, adapter, autocast_adapter_dtype=autocast_adapter_dtype)


def _training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: dict[str, Tensor], device: torch.device
) -> Step:
    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def _decoding_cases(arguments: argparse.Namespace, device: torch.device) -> dict[str, Callable[[nn.Module], list[Row]]]:
    return {
        f"decode, batch {together}, E={E}, r={r}": (
            lambda llava, E=E, r=r, together=together: _decode(llava, E, r, together, arguments, device)
        )
        for together in DECODED_TOGETHER
        for E, r in POOLS
    }


def _decode(
    llava: nn.Module, E: int, r: int, together: int, arguments: argparse.Namespace, device: torch.device
) -> list[Row]:
    batch = _batch(SIZES[arguments.size], together, device)
    steps, rows = {}, {}
    for name, adapter in adapters(E, r).items():
        model = sharing_copy(llava)
        if adapter is not None:
            model = _adapted(model, adapter, autocast_adapter_dtype=False)  # as upstream's builder loads them
        steps[name] = step = _decoding_step(model.eval(), batch)
        rows[name] = {"variant": name, "profile": profile_of(step, device)}
    for name, times in take_turns(steps, arguments.rounds, REFERENCE, f"E={E}", clock_of(device)).items():
        rows[name] |= {**times, "tokens_per_second": round(1000 * together / times["milliseconds"], 1)}
    return list(rows.values())


def _decoding_step(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    token = batch["input_ids"][:, -1:]
    with torch.inference_mode():
        prompt = {key: batch[key] for key in ("input_ids", "attention_mask", "images")}
        cache = model(**prompt, use_cache=True).past_key_values

    def step() -> None:
        with torch.inference_mode():
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)  # the token is forgotten, so that every round decodes the same position

    return step


def _loading_cases(arguments: argparse.Namespace, device: torch.device) -> dict[str, Callable[[nn.Module], list[Row]]]:
    return {f"load, E={E}, r={r}": lambda llava, E=E, r=r: _load(llava, E, r, device) for E, r in POOLS}


def _load(llava: nn.Module, E: int, r: int, device: torch.device) -> list[Row]:
    rows = []
    for name, adapter in adapters(E, r).items():
        if adapter is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            _adapted(sharing_copy(llava), adapter, autocast_adapter_dtype=False).save_pretrained(folder)
            size = (Path(folder) / "adapter_model.safetensors").stat().st_size
            seconds = [_seconds_to_load(llava, folder, device) for _ in range(1 + LOADS)][1:]
        rows.append(
            {"variant": name, "milliseconds": round(1000 * statistics.median(seconds), 1), "adapter_bytes": size}
        )
        _free()
    reference = next(row for row in rows if row["variant"] == REFERENCE)
    for row in rows:
        row["milliseconds_ratio"] = round(row["milliseconds"] / reference["milliseconds"], 3)
    return rows


def _seconds_to_load(llava: nn.Module, folder: str, device: torch.device) -> float:
    base = sharing_copy(llava)

    def load() -> None:
        PeftModel.from_pretrained(base, folder)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return processor_clock(load)


CASES: dict[str, Callable[..., dict[str, Callable[[nn.Module], list[Row]]]]] = {
    "train": _training_cases,
    "decode": _decoding_cases,
    "load": _loading_cases,
}


def _batch(size: Size, instances: int, device: torch.device) -> dict[str, Tensor]:
    """An image and then text for every instance, of which the second half is the answer."""
    torch.manual_seed(1)
    side = size.tower["image_size"]
    input_ids = torch.randint(3, size.language["vocab_size"], (instances, 1 + size.text_tokens), device=device)
    input_ids[:, 0] = IMAGE_TOKEN_INDEX
    labels = input_ids.clone()
    labels[:, : 1 + size.text_tokens // 2] = IGNORE_INDEX
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": torch.ones_like(input_ids, dtype=torch.bool),
        "images": torch.randn(instances, 3, side, side, device=device, dtype=torch.bfloat16),
    }


def _device(arguments: argparse.Namespace) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if arguments.device is None and not has_gpu and arguments.size == "7b":
        raise MixLoraError("--size 7b needs a CUDA GPU, and PyTorch sees none; --size narrow measures on the CPU")
    try:
        device = torch.device(arguments.device or ("cuda" if has_gpu else "cpu"))
    except RuntimeError:
        raise MixLoraError(f"--device {arguments.device}: expected cuda, cuda:N or cpu") from None
    if device.type == "cuda":
        if not has_gpu or (device.index or 0) >= torch.cuda.device_count():
            raise MixLoraError(f"--device {arguments.device}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs")
        torch.cuda.set_device(device)
    return device


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
