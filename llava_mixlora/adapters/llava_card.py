"""What a model card says of an adapter for LLaVA, whose projector lies beside the adapter."""

from __future__ import annotations

from ..llava_package import ORIGINAL, LlavaPackage, used
from ..method.model_card import TrainingRecord
from .adapter_folder import NON_LORA_TRAINABLES, SAFE_NON_LORA_TRAINABLES


def llava_record() -> TrainingRecord:
    """The record of a training of which nothing is known but that it was of a LLaVA."""
    return TrainingRecord(loading=_loading(used()), pipeline_tag="image-text-to-text")


def _loading(package: LlavaPackage) -> str:
    """How an adapter of that LLaVA is asked; of LLaVA itself, it need not be installed to be told."""
    install = "pip install --no-deps llava-torch==1.2.2.post1 && pip install llava-mixlora"
    program, builder, use = "llava.serve.cli", "llava.model.builder", ""
    if package.name != ORIGINAL:
        install = f"pip install llava-mixlora  # beside {package.name}, the LLaVA that trained it"
        program, builder = package.module(program), package.module(builder)
        use = f"from llava_mixlora.llava_package import LlavaPackage, use\n\nuse(LlavaPackage({package.name!r}))"
    ask = f"llava-mixlora run -m {program} --model-path ADAPTER --image-file IMAGE"
    if program is None:
        ask = "llava-mixlora eval --model-path ADAPTER --help"
    return f"""```bash
{install}
{ask}
```

ADAPTER is this folder; its base is found by the name that it records (`--model-base` names another place). In Python:

```python
from llava_mixlora import patches  # makes PEFT know the type MIXLORA, and LLaVA keep the adapter
{use}
patches.apply()
from {builder} import load_pretrained_model

tokenizer, model, image_processor, _ = load_pretrained_model("ADAPTER", None, "llava-mixlora")
```

The projector was trained beside the adapter and lies in `{SAFE_NON_LORA_TRAINABLES}` and, for LLaVA alone, in
`{NON_LORA_TRAINABLES}`. After `patches.apply()`, `PeftModel.from_pretrained` and `AutoPeftModelForCausalLM` put it
into a LLaVA too; else the base's stays in its place. Without `import llava_mixlora`, PEFT ends with
`KeyError: 'MIXLORA'`."""
