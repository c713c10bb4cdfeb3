"""The model card (`README.md`) that is saved with every adapter: what it is, what it was trained on, how to load it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open

from .registration import PeftConfig
from .tensor_names import FURTHER, KINDS, STATISTICS

CARD = "README.md"
OURS = "<!-- Written anew by llava-mixlora at every save; take this line out to keep a text of your own. -->"
PAPER = "https://arxiv.org/abs/2402.15896"
TEMPLATE_GAP = "[More Information Needed]"
RESULTS, TRAINING = "## Results", "## Training"
SETTINGS = (
    *("pairing", "routing", "num_factors", "r", "lora_alpha", "lora_dropout"),
    *("router_gradient", "router_init", "router_scope", "router_input", "count_padding", "decode_routing"),
    *("balance_loss_weight", "task_loss_weight", "bias"),
)
SETTINGS_OF_CFS = ("cfs", "cfs_temperature", "cfs_product")
SETTINGS_WHERE_GIVEN = ("tasks", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform")
VERSIONS = ("llava-mixlora", "peft", "transformers", "torch", "deepspeed", "bitsandbytes")


@dataclass
class TrainingRecord:
    """What a card tells of a training run; assign one to `model.peft_config[adapter].training_record`.

    Args:
        data: name of the data set.
        samples: how many it has.
        sha256: of its file, in hexadecimal digits.
        hyperparameters: by name.
        loading: Markdown on how to load the adapter, where `PeftModel.from_pretrained` is not all.
        pipeline_tag: the hub's word for what the model does, where PEFT's is not right.
        continues: the adapter that the run went on from.
    """

    data: str | None = None
    samples: int | None = None
    sha256: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    loading: str | None = None
    pipeline_tag: str | None = None
    continues: str | None = None


def settings_of(config: PeftConfig) -> dict[str, Any]:
    """By name, the fields of a [`MixLoraConfig`] that tell what the adapter does, without those that say nothing."""
    names = [*SETTINGS, *(SETTINGS_OF_CFS if config.routing == "ifs_cfs" else ())]
    names += [name for name in SETTINGS_WHERE_GIVEN if getattr(config, name)]
    return {name: getattr(config, name) for name in names}


def write_card(config: PeftConfig, folder: str | Path, record: TrainingRecord | None = None) -> None:
    """Write the card of the adapter that was just saved in `folder`.

    It takes the place of the empty template that PEFT writes, and of an earlier card of this function; a text that
    somebody wrote stays. Where `folder` holds a configuration and no adapter, nothing is written.
    """
    folder, record = Path(folder), record or TrainingRecord()
    if not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        return
    file = folder / CARD
    written = ModelCard.load(file) if file.is_file() else None
    if written is not None and not _may_replace(written.text):
        return
    data = written.data if written is not None else ModelCardData(library_name="peft")
    base = config.base_model_name_or_path
    tags = {*(data.tags or ()), "mixlora"}
    if base and not Path(base).exists():
        data.base_model = base
    else:  # a folder of this machine, which the hub refuses as the name of a model
        data.base_model = None
        tags = {tag for tag in tags if not tag.startswith("base_model:")}
    data.tags = sorted(tags)
    data.pipeline_tag = record.pipeline_tag or data.pipeline_tag
    text = "\n".join(_lines(config, folder, base, record))
    file.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")


def add_results(folder: str | Path, results: str) -> None:
    """Put Markdown on an adapter's results into its card, in the place of earlier ones; into none but our own card."""
    file = Path(folder) / CARD
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if OURS in text:
        text = re.sub(rf"^{RESULTS}\n.*?(?=^## )", "", text, flags=re.M | re.S)
        before, heading, after = text.partition(f"{TRAINING}\n")
        file.write_text(f"{before}{RESULTS}\n\n{results.strip()}\n\n{heading}{after}", encoding="utf-8")


def _may_replace(text: str) -> bool:
    # PEFT's card is the hub's template with lines added; whoever wrote into it has filled gaps.
    template = ModelCard.from_template(ModelCardData()).text
    return OURS in text or text.count(TEMPLATE_GAP) == template.count(TEMPLATE_GAP)


def _lines(config: PeftConfig, folder: Path, base: str | None, record: TrainingRecord) -> Iterator[str]:
    name = Path(base).name if base and Path(base).exists() else base
    yield OURS
    yield ""
    yield f"# {folder.resolve().name}: a MixLoRA adapter"
    yield ""
    yield f"An adapter for {f'`{name}`' if name else 'a base model whose name is not recorded'}, of the method"
    yield f"[MixLoRA]({PAPER}): from pools of rank-one factors, routers assemble a low-rank update of its own for every"
    yield "input. The package `llava-mixlora` adds the method to [PEFT](https://github.com/huggingface/peft), as type"
    yield "`MIXLORA`."
    yield ""
    yield "## Load it"
    yield ""
    yield record.loading or _loading(name or "BASE_MODEL", folder.resolve().name)
    yield ""
    yield "## Method and settings"
    yield ""
    yield from _table(("setting", "value"), settings_of(config))
    yield ""
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        yield "## Parameters"
        yield ""
        yield from _table(("kind", "number"), _parameters(folder / SAFETENSORS_WEIGHTS_NAME))
        yield ""
    yield TRAINING
    yield ""
    if record.data is None and not record.hyperparameters:
        yield "Data and hyperparameters are not recorded."
    facts = {
        "continues": record.continues,
        "data": record.data,
        "samples": record.samples,
        "sha256 of the data": record.sha256,
    }
    told = {name: value for name, value in {**facts, **record.hyperparameters}.items() if value is not None}
    if told:
        yield from _table(("what", "value"), told)
    yield ""
    yield "## Versions"
    yield ""
    yield from _table(("package", "version"), dict(_versions()))


def _loading(base: str, adapter: str) -> str:
    return f"""```bash
pip install llava-mixlora
```

```python
import llava_mixlora  # makes PEFT know the type MIXLORA
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{adapter}").eval()
```

Without `import llava_mixlora`, PEFT ends with `KeyError: 'MIXLORA'`."""


def _table(titles: tuple[str, str], rows: dict[str, Any]) -> Iterator[str]:
    yield f"| {titles[0]} | {titles[1]} |"
    yield "| --- | --- |"
    for name, value in rows.items():
        shown = f"{value:,}" if titles[1] == "number" else f"{value}".replace("|", r"\|")
        yield f"| {name} | {shown} |".replace("\n", " ")


def _parameters(file: Path) -> dict[str, int]:
    """How many numbers of each kind the adapter's file holds."""
    kinds = dict.fromkeys((*KINDS.values(), FURTHER), 0)
    with safe_open(str(file), framework="pt") as tensors:
        names = tensors.keys()  # the file itself cannot be iterated over
        for name in names:
            if STATISTICS not in name:
                kind = KINDS.get(name.rpartition(".")[2], FURTHER)
                kinds[kind] += math.prod(tensors.get_slice(name).get_shape())
    return {kind: number for kind, number in kinds.items() if number} | {"total": sum(kinds.values())}


def _versions() -> Iterator[tuple[str, str]]:
    for package in VERSIONS:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
