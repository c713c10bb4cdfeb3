"""What a model card says of an adapter for transformers' own LLaVA."""

from __future__ import annotations

from ..method.model_card import TrainingRecord


def native_record() -> TrainingRecord:
    """The record of an adapter that was turned into one for transformers' LLaVA."""
    return TrainingRecord(loading=LOADING, pipeline_tag="image-text-to-text")


LOADING = """```bash
pip install llava-mixlora
```

BASE is the checkpoint that this folder was exported with, ADAPTER this folder:

```python
import llava_mixlora  # makes PEFT know the type MIXLORA
from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained("BASE")
model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained("BASE"), "ADAPTER").eval()
```

The projector of the training is in BASE. Without `import llava_mixlora`, PEFT ends with `KeyError: 'MIXLORA'`."""
