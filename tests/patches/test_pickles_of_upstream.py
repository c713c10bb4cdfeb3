"""What upstream's modules load is read as tensors alone."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from ..tiny import message_of


class Code:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.fixture
def hostile(tmp_path):
    """A projector that makes a folder when it is unpickled."""
    torch.save({"model.mm_projector.0.weight": Code(tmp_path / "ran")}, tmp_path / "mm_projector.bin")
    return tmp_path


def test_projector_with_code_is_not_run_when_a_model_is_loaded(patched, llava_folder, hostile, monkeypatch):
    from llava.model import builder

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as PyTorch did before 2.6
    shutil.copy(llava_folder / "config.json", hostile)
    said = message_of(builder.load_pretrained_model, str(hostile), str(llava_folder), "llava-7b", device="cpu")
    assert "mm_projector.bin holds code ('posix.mkdir'), which was not executed" in said
    assert not (hostile / "ran").exists()


def test_projector_with_code_is_not_run_when_training_begins(patched, llava, clip_folder, hostile, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    flags = SimpleNamespace(
        vision_tower=str(clip_folder),
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_projector_type="mlp2x_gelu",
        mm_patch_merge_type="flat",
        pretrain_mm_mlp_adapter=str(hostile / "mm_projector.bin"),
    )
    assert "holds code" in message_of(llava.get_model().initialize_vision_modules, flags)
    assert not (hostile / "ran").exists()


def test_everything_else_of_torch_is_itself(patched):
    from llava.model import builder, llava_arch

    for module in (builder, llava_arch):
        assert module.torch.Tensor is torch.Tensor and module.torch.nn is torch.nn
