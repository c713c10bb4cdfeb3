"""What the tensors of a saved adapter are called, and of which kind each is."""

from __future__ import annotations

PEFT_PREFIX = "base_model.model."
"""What a PeftModel puts before the names that its base model has."""

KINDS = {
    "mixlora_A": "pool A",
    "mixlora_B": "pool B",
    "mixlora_router_A": "routers",
    "mixlora_router_B": "routers",
    "mixlora_cfs": "cfs",
}
"""By the last part of a tensor's name, which of the method's parameters it is."""

FURTHER = "further modules"
"""The kind of what is saved in an adapter's file beside the method's parameters: modules to save, biases."""

STATISTICS = ".mixlora_stats"
"""In the names of tensors that are counted and not trained."""

USAGE = f"{STATISTICS}_usage"


def by_number(name: str) -> list[str]:
    """A sorting key under which layers.10 comes after layers.9."""
    return [f"{int(part):08}" if part.isdigit() else part for part in name.split(".")]
