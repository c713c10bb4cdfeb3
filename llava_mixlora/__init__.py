"""MixLoRA (Shen et al., ACL 2024) as a PEFT method, and as a plugin for LLaVA.

Importing this package registers the PEFT type `MIXLORA` and changes nothing else; what LLaVA needs is applied by
`llava_mixlora.patches.apply()`, which `llava-mixlora run` calls.
"""

from importlib.metadata import version

from .config import MixLoraConfig
from .errors import MixLoraError
from .layer import MixLoraLayer
from .model import MixLoraModel
from .registration import register

register(MixLoraConfig, MixLoraModel)

__all__ = ["MixLoraConfig", "MixLoraError", "MixLoraLayer", "MixLoraModel"]
__version__ = version("llava-mixlora")
