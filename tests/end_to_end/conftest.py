"""What end-to-end tests train on."""

import pytest
import torch

from ..conftest import PACKABLE_LLAMA
from .training import write_inputs

ANSWER = "red"  # always: the loss is a mean over tokens, and halves of a batch must have equally many


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, _llava, clip_folder, tokenizer_folder):
    """A random LLaVA and eight pictures with a question each, as flags of llava.train.train for two short steps."""
    torch.manual_seed(4)
    llava = type(_llava)(type(_llava.config)(**{**_llava.config.to_dict(), **PACKABLE_LLAMA}))
    flags = write_inputs(tmp_path_factory.mktemp("inputs"), llava, clip_folder, tokenizer_folder, 8 * [ANSWER])
    optimizer = ["--optim=sgd", "--learning_rate=1.0"]  # Adam makes full steps of what is rounding noise in a gradient
    return [*flags, *optimizer, "--max_steps=2", "--evaluation_strategy=no", "--save_strategy=no"]
