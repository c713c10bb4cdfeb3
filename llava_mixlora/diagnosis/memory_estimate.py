"""What a training run will hold in memory, told from a model's configuration alone.

Nothing is loaded: the model is built on the meta device with real MixLoRA adapters in it, so that parameters are
counted and not calculated, and one step is run on shapes alone ([`step_memory`]). Bytes are those of a run of LLaVA's
train().
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
)

from ..adapters.llava_config import as_data
from ..errors import MixLoraError
from ..inputs import check_model_path, expanded, read_json
from ..llava_package import part
from ..method.config import MixLoraConfig
from ..method.tensor_names import FURTHER, KINDS
from .step_memory import MEASURED_LAYERS, QuantizedLinear, TrainedLlava, peak_of_encoding, peak_of_step

ARCHITECTURES = {
    "llama": LlamaConfig,
    "llava_llama": LlamaConfig,
    "llava": LlamaConfig,  # what LLaVA 1.0 called llava_llama
    "mistral": MistralConfig,
    "llava_mistral": MistralConfig,
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
NOT_OF_THE_LANGUAGE_MODEL = ("model_type", "architectures", "quantization_config", "torch_dtype", "dtype", "use_cache")
CLIP_LARGE_336 = "openai/clip-vit-large-patch14-336"
CLIP_LARGE_336_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
BITS = (16, 8, 4)
OPTIMIZERS = ("adamw", "paged_adamw_8bit")
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STAGES = ("none", "ZeRO-2", "ZeRO-3", "ZeRO-3 + CPU offload")
MAX_LIVE_PARAMETERS = 10**9  # stage3_max_live_parameters in LLaVA's zero3.json
REFUSED = "ZeRO-3 does not partition quantized weights"

# bitsandbytes: nf4 in blocks of 64 whose scales are quantized in blocks of 256; a code book for each; one offset.
NF4_BLOCK, SCALE_BLOCK, NF4_CODES, SCALE_CODES = 64, 256, 16, 256
# bitsandbytes' 8-bit optimizers: smaller tensors keep 32-bit states; two code books for all.
SMALLEST_8BIT, OPTIMIZER_BLOCK = 4096, 256


@dataclass(frozen=True)
class RunSettings:
    """The flags of a run that decide its memory. `sequence_length` counts text and image tokens.

    None stands for the default of [`MixLoraConfig`], and is that once the settings are made.

    Raises:
        MixLoraError: a value is outside its set, r exceeds num_factors, or values contradict each other.
    """

    num_factors: int = 16
    r: int = 4
    lora_dropout: float = 0.05
    pairing: str | None = None
    routing: str | None = None
    router_gradient: str = "straight_through"
    router_input: str | None = None
    cfs: str = "weights"
    batch_size: int = 16
    sequence_length: int = 2048
    gradient_checkpointing: bool = True
    gpus: int = 1
    optimizer: str = "adamw"
    compute_dtype: str = "bf16"

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "gpus"):
            if getattr(self, name) < 1:
                raise MixLoraError(f"{name}={getattr(self, name)}: expected a whole number of at least 1")
        for name, known in (("optimizer", OPTIMIZERS), ("compute_dtype", tuple(COMPUTE_DTYPES))):
            if getattr(self, name) not in known:
                raise MixLoraError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")
        adapter = self.adapter()
        for name in ("pairing", "routing", "router_input"):
            object.__setattr__(self, name, getattr(adapter, name))

    def adapter(self) -> MixLoraConfig:
        """The adapter that the run trains."""
        return MixLoraConfig(
            r=self.r,
            num_factors=self.num_factors,
            lora_dropout=self.lora_dropout,
            pairing=self.pairing,
            routing=self.routing,
            router_gradient=self.router_gradient,
            router_input=self.router_input,
            cfs=self.cfs,
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True)
class ModelConfig:
    """What MODEL_CONFIG says: the language model, and the tower and projector that a run puts before it.

    `from_llava`: the projector comes with the model, in the dtype of its weights. `notes`: what had to be assumed.
    """

    language: PretrainedConfig
    tower: CLIPVisionConfig | None
    projector_type: str
    image_tokens: int
    select_layer: int
    from_llava: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Components:
    """Bytes per GPU of a run in plain data parallelism (no ZeRO), for one number of bits.

    `activations` is the most that a step holds beside the rest: what is kept for the backward pass, the logits and
    their float32 copies, and what is there for a moment.
    """

    base: int
    tower: int
    trained: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Cell:
    """Bytes per GPU, and in the host's memory per GPU, for one number of bits and one stage; or why it cannot be."""

    gpu: int = 0
    host: int = 0
    refused: str = ""


@dataclass
class MemoryEstimate:
    """Everything that `doctor --estimate` tells. `parameters`: trained ones by kind. `frozen`: the number of others."""

    settings: RunSettings
    notes: tuple[str, ...]
    parameters: dict[str, int] = field(default_factory=dict)
    frozen: int = 0
    components: dict[int, Components] = field(default_factory=dict)
    cells: dict[int, dict[str, Cell]] = field(default_factory=dict)


def estimate(model: ModelConfig, settings: RunSettings, bits: Sequence[int] = BITS) -> MemoryEstimate:
    """Estimate a run for each of the numbers of `bits`, and every stage.

    Raises:
        MixLoraError: one of `bits` is not 16, 8 or 4, or the sequence does not hold one image and one token of text.
    """
    for width in bits:
        if width not in BITS:
            raise MixLoraError(f"bits={width}: expected 16, 8 or 4")
    if settings.sequence_length <= model.image_tokens:
        raise MixLoraError(
            f"sequence_length={settings.sequence_length}: expected more than the {model.image_tokens} tokens of an "
            "image; raise --sequence-length"
        )
    result = MemoryEstimate(settings, model.notes)
    for width, activations in activation_bytes(model, settings, bits).items():
        built = build(model, settings, width)
        result.parameters = trained_by_kind(built)  # in number the same for any bits
        result.frozen = sum(p.numel() for p in built.parameters() if not p.requires_grad)
        result.components[width] = count(built, settings, width, activations)
        result.cells[width] = {
            stage: _cell(stage, built, result.components[width], settings, width) for stage in STAGES
        }
    return result


def read_model_config(source: str, vision_tower: str | None = None) -> ModelConfig:
    """Read a model folder, a config.json, or a name on the hub; `vision_tower` goes before the tower named there.

    Raises:
        MixLoraError: nothing is there, it is no model's configuration, or the architecture is not supported.
    """
    values = _read_config(source)
    kind = values.get("model_type")
    if "text_config" in values or kind not in ARCHITECTURES:
        raise MixLoraError(
            f"{source}: model_type {kind!r} is not supported; expected {', '.join(ARCHITECTURES)} in LLaVA's own format"
        )
    for name in SIZES:
        if not isinstance(values.get(name), int) or values[name] < 1:
            raise MixLoraError(
                f"{source}: {name} is {values.get(name)!r}, but a model's configuration has a whole number of at least "
                "1 there; give a model's folder or its config.json"
            )
    values = as_data(values, source)
    own = {k: v for k, v in values.items() if not k.startswith("mm_") and k not in NOT_OF_THE_LANGUAGE_MODEL}
    try:
        language = ARCHITECTURES[kind](**own, use_cache=False)
    except Exception as error:  # transformers' checks of a configuration raise types of their own
        reason = " ".join(str(error).split())
        raise MixLoraError(f"{source}: not a configuration that transformers accepts ({reason})") from error
    notes: list[str] = []
    tower = _read_tower(vision_tower or values.get("mm_vision_tower"), notes)
    image_tokens = 0
    if tower is not None:
        image_tokens = (tower.image_size // tower.patch_size) ** 2
        image_tokens += values.get("mm_vision_select_feature") == "cls_patch"
    return ModelConfig(
        language,
        tower,
        values.get("mm_projector_type", "mlp2x_gelu"),
        image_tokens,
        values.get("mm_vision_select_layer", -2),
        "mm_vision_tower" in values,
        tuple(notes),
    )


def build(model: ModelConfig, settings: RunSettings, bits: int, layers: int | None = None) -> TrainedLlava:
    """The model that train() makes, on the meta device, with dtypes as there; `layers` cuts the decoder short."""
    compute = COMPUTE_DTYPES[settings.compute_dtype]
    config = type(model.language).from_dict(model.language.to_dict())
    config.num_hidden_layers = model.language.num_hidden_layers if layers is None else layers
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(config, dtype=compute)
        if bits < 16:
            _store_quantized(language, bits, compute)
        else:
            language.to(compute)  # the rotary embedding's buffers too, as train() does
        language = get_peft_model(language, settings.adapter())
        tower = projector = None
        if model.tower is not None:
            tower = _tower(model.tower, settings)
            fresh = bits == 16 and not model.from_llava  # train() makes it in float32, and casts it only if quantized
            projector = _projector(model).to(torch.float32 if fresh else compute)
    return TrainedLlava(language, tower, projector, model.select_layer, model.image_tokens)


def trained_by_kind(model: TrainedLlava) -> dict[str, int]:
    """The number of trained parameters: pool A, pool B, routers, cfs, projector."""
    kinds = dict.fromkeys((*KINDS.values(), "projector"), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_projector = name.startswith("mm_projector.")
            kind = "projector" if is_projector else KINDS.get(name.split(".")[-2], FURTHER)
            kinds[kind] = kinds.get(kind, 0) + parameter.numel()
    return kinds


def count(model: TrainedLlava, settings: RunSettings, bits: int, activations: int) -> Components:
    """The bytes of a built model, beside those of a step's `activations`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    bytes_trained = sum(map(_bytes, trained))
    return Components(
        base=base_bytes(model.language, bits),
        tower=0 if model.vision_tower is None else sum(map(_bytes, model.vision_tower.parameters())),
        trained=bytes_trained,
        gradients=bytes_trained,
        optimizer=optimizer_bytes(trained, settings.optimizer),
        # AdamW takes the root of all second moments at once, when the activations are gone.
        activations=max(activations, bytes_trained if settings.optimizer == "adamw" else 0),
    )


def base_bytes(language: nn.Module, bits: int) -> int:
    """Bytes of everything frozen in the language model, with the constants of quantized weights, and its buffers."""
    quantized = [module.weight for module in language.modules() if isinstance(module, QuantizedLinear)]
    apart = {id(weight) for weight in quantized}
    whole = [p for p in language.parameters() if not p.requires_grad and id(p) not in apart]
    stored = sum(_stored_bytes(weight.shape[0], weight.shape[1], bits) for weight in quantized)
    return stored + sum(map(_bytes, whole)) + sum(map(_bytes, language.buffers()))


def optimizer_bytes(parameters: list[nn.Parameter], optimizer: str) -> int:
    """Bytes of the optimizer's state: torch's AdamW, or bitsandbytes' 8-bit one (paged: it may move to the host)."""
    if optimizer == "adamw":
        return sum(2 * _bytes(parameter) + 4 for parameter in parameters)  # two moments and a step
    code_books = 2 * 256 * 4 if any(p.numel() >= SMALLEST_8BIT for p in parameters) else 0
    return code_books + sum(_two_moments_in_8_bits(parameter.numel()) for parameter in parameters)


def activation_bytes(model: ModelConfig, settings: RunSettings, bits: Sequence[int] = BITS) -> dict[int, int]:
    """The most that one step allocates beside weights, gradients and optimizer state, by number of bits."""
    depth = model.language.num_hidden_layers
    layers = min(depth, MEASURED_LAYERS)
    encoding = 0
    if model.tower is not None:
        encoding = peak_of_encoding(_tower(model.tower, settings), settings.batch_size)
    return {
        width: max(
            encoding,
            peak_of_step(
                build(model, settings, width, layers),
                depth,
                settings.batch_size,
                settings.sequence_length,
                settings.gradient_checkpointing,
                COMPUTE_DTYPES[settings.compute_dtype],
            ),
        )
        for width in bits
    }


def _cell(stage: str, model: TrainedLlava, plain: Components, settings: RunSettings, bits: int) -> Cell:
    """`plain` divided by the GPUs as DeepSpeed does it with LLaVA's zero*.json.

    What trains is held in the compute dtype; its float32 copy and the optimizer's state are divided, and by ZeRO-3 the
    weights too.
    """
    if stage == "none":
        # Gradients are reduced in buckets that are a copy of them.
        return Cell(plain.total + (plain.gradients if settings.gpus > 1 else 0))
    if stage != "ZeRO-2" and bits < 16:
        return Cell(refused=REFUSED)
    width = COMPUTE_DTYPES[settings.compute_dtype].itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = 8 * trained if settings.optimizer == "adamw" else _two_moments_in_8_bits(trained)
    divided = (4 * trained + states + (width + 4) * trained) // settings.gpus  # copy, moments, both widths of gradients
    bucket = model.language.config.hidden_size**2 * width  # reduce_bucket_size "auto"
    weights = plain.base + plain.tower + width * trained
    if stage == "ZeRO-2":
        return Cell(weights + divided + 2 * bucket + plain.activations)  # overlap_comm fills one and sends another
    gathered = min(MAX_LIVE_PARAMETERS, sum(p.numel() for p in model.parameters())) * width
    working = gathered + 2 * bucket + plain.activations  # and one for the parameters fetched ahead
    if stage == "ZeRO-3":
        return Cell(weights // settings.gpus + divided + working)
    return Cell(working, weights // settings.gpus + divided)


def _read_config(source: str) -> dict[str, Any]:
    check_model_path("--estimate", source)
    path = expanded(source)
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists() and path.suffix != ".json":
        try:
            return PretrainedConfig.get_config_dict(source)[0]
        except Exception as error:  # offline, no such name, no access: the hub's client has a type for each
            raise MixLoraError(
                f"--estimate {source}: no such folder, and no such model can be read from the hub; give a model's "
                "folder or its config.json"
            ) from error
    values = read_json(path)
    if "model_type" not in values:
        raise MixLoraError(f"{path}: no model's configuration: it has no model_type; expected a model's config.json")
    return values


def _read_tower(name: str | None, notes: list[str]) -> CLIPVisionConfig | None:
    if name == "none":
        return None
    if name is None:
        notes.append(f"no vision tower is named: assuming {CLIP_LARGE_336} (--vision-tower none: text only)")
    if name in (None, CLIP_LARGE_336):
        return CLIPVisionConfig(**CLIP_LARGE_336_SIZES)
    check_model_path("--vision-tower", name)
    try:
        config = CLIPVisionConfig.from_pretrained(name)
    except Exception as error:  # as above
        if expanded(name).exists():
            reason = " ".join(str(error).split())
            raise MixLoraError(f"--vision-tower {name}: not the folder of a CLIP model ({reason})") from error
        notes.append(f"vision tower {name} cannot be read: assuming the sizes of {CLIP_LARGE_336}")
        return CLIPVisionConfig(**CLIP_LARGE_336_SIZES)
    return config


def _store_quantized(language: nn.Module, bits: int, compute: torch.dtype) -> None:
    """As `--bits` leaves it: every linear layer quantized, LLaVA skips none but the projector; norms in float32."""
    for name, module in list(language.named_modules()):
        if isinstance(module, nn.Linear):
            parent = language.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], QuantizedLinear(module, bits, compute))
        elif "norm" in name:
            module.to(torch.float32)


def _tower(config: CLIPVisionConfig, settings: RunSettings) -> nn.Module:
    dtype = torch.bfloat16 if settings.compute_dtype == "bf16" else torch.float16  # train() knows no other two
    with torch.device("meta"):
        return CLIPVisionModel(config).to(dtype).requires_grad_(False).eval()


def _projector(model: ModelConfig) -> nn.Module:
    from .. import patches

    patches.apply()  # without them LLaVA cannot be imported
    build_vision_projector = part("llava.model.multimodal_projector.builder:build_vision_projector")
    sizes = PretrainedConfig(
        mm_projector_type=model.projector_type,
        mm_hidden_size=model.tower.hidden_size,
        hidden_size=model.language.hidden_size,
    )
    try:
        return build_vision_projector(sizes)
    except ValueError as error:
        raise MixLoraError(f"mm_projector_type: {error}; expected linear, identity or mlp2x_gelu") from error


def _stored_bytes(d_out: int, d_in: int, bits: int) -> int:
    numbers = d_out * d_in
    if bits == 8:
        return numbers + 4 * d_out  # a float32 scale per row
    blocks = -(-numbers // NF4_BLOCK)
    return -(-numbers // 2) + blocks + 4 * (-(-blocks // SCALE_BLOCK) + NF4_CODES + SCALE_CODES + 1)


def _two_moments_in_8_bits(numbers: int) -> int:
    if numbers < SMALLEST_8BIT:
        return 2 * 4 * numbers
    return 2 * (numbers + 4 * -(-numbers // OPTIMIZER_BLOCK))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
