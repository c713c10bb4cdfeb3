"""`llava-mixlora export-lora --for-prompt`: the exact LoRA of one question about one image.

Where a static stand-in for all prompts loses, that of one prompt loses nothing: with routes held, the update is a LoRA
of rank r (`method.prompt_lora`).
"""

from __future__ import annotations

from pathlib import Path

from ..adapters.adapter_folder import read_config
from ..adapters.model_choices import AS_NAMED, ModelChoices
from ..adapters.model_folders import new_folder
from ..adapters.model_places import base_model_of
from ..data.images import open_image
from ..errors import MixLoraError
from ..evaluation.answering import check_conversation, inputs_of
from ..inference.conversation import conversation_of
from ..inference.loading import load_for_inference
from .fit import FLAG, check_merge
from .lora_folder import write_lora
from .stand_in import TEMPLATE
from .static_adapter import SavedAdapter


def export_lora_for_prompt(
    model_path: str | Path,
    model_base: str | None,
    output: str | Path,
    image: str | Path,
    question: str,
    conversation: str | None = None,
    choices: ModelChoices = AS_NAMED,
) -> None:
    """Write `output`: what the adapter is for one prompt, as a LoRA of rank r for PEFT and for LLaVA's own LoRA branch.

    Args:
        model_path: the adapter's folder.
        model_base: its base; by default the one that it names.
        output: a new folder.
        image: a file.
        question: about it, without `<image>`.
        conversation: the template; by default that of the training.
        choices: what the user says of the model's parts.

    Raises:
        MixLoraError: the image cannot be read, there is no such template, the adapter has no LoRA of a prompt (see
            `MixLoraModel.loras_of_prompts`), or as [`merge.export_lora`]. No folder appears then.
    """
    if not question.strip():
        raise MixLoraError(f"--for-prompt {image} {question!r}: the question is empty; expected the text of one")
    if read_config(model_path).decode_routing != "prefill":
        raise MixLoraError(
            f"{model_path} routes every step of an answer anew (decode_routing='step'), so no one LoRA is its update "
            "of a prompt; without --for-prompt a stand-in for all prompts is made"
        )
    picture = open_image(Path(image))
    adapter, output = SavedAdapter(model_path, choices.allow_incomplete), Path(output)
    check_merge(adapter, model_base, output, choices, copies_base=False)
    template = conversation_of(model_path, conversation, "--version", otherwise=TEMPLATE)
    check_conversation(template, "--version")
    loaded = load_for_inference(model_path, model_base, choices=choices)
    lora = loaded[1].lora_of_prompt(**inputs_of(loaded, [question], [picture], template))
    with new_folder(FLAG, output) as folder:
        write_lora(adapter, base_model_of(adapter.folder, model_base), lora, folder)
