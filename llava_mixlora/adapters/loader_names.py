"""The names by which LLaVA's loader, which looks at no `config.json`, takes its branch (`load_pretrained_model`)."""

from __future__ import annotations

from pathlib import Path

NAMES = {"llava_llama": "llava", "llava_mistral": "llava-mistral", "llava_mpt": "llava-mpt"}
"""By `model_type`, a name that takes the right branch."""
FAMILIES = ("mistral", "mpt")


def loader_name(model_type: str | None, is_adapter: bool = False) -> str | None:
    """A name that takes the right branch for a model of this type; None where it is no LLaVA's."""
    name = NAMES.get(model_type)
    return f"{name}-lora" if name and is_adapter else name


def misleading(folder: str | Path, model_type: str | None, its_own: str | None = None) -> str | None:
    """What of a folder's name takes LLaVA's loader elsewhere, and a name to give it; None: it loads by its name.

    The name counts as `get_model_name_from_path` tells it: with the folder above, for one called checkpoint-N.

    Args:
        folder: of the model.
        model_type: of its `config.json`.
        its_own: a name that takes the right branch of a fork's own loader.
    """
    needed = its_own or loader_name(model_type)
    if needed is None:
        return None
    path = Path(folder).absolute()
    name = f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name
    words = name.lower()
    lacking = [word for word in needed.split("-") if word not in words]
    wrong = [word for word in (*FAMILIES, "lora") if word in words and word not in needed]
    if not lacking and not wrong:
        return None
    reasons = [f"has no {word!r}" for word in lacking] + [f"has {word!r}" for word in wrong]
    return f"{name!r} {' and '.join(reasons)}; rename it, such as to {_renamed(name, lacking, wrong)!r}"


def _renamed(name: str, lacking: list[str], wrong: list[str]) -> str:
    for word in wrong:
        place = name.lower().find(word)
        while place >= 0:
            name = name[:place] + name[place + len(word) :]
            place = name.lower().find(word)
    rest = "-".join(part for part in name.replace("_", "-").split("-") if part)
    return "-".join([*lacking, rest or "merged"])
