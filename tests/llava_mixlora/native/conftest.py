"""Upstream's LLaVA and transformers', asked the same."""

import shutil

import pytest
import transformers
from packaging.version import Version
from PIL import Image

from llava_mixlora.native.export import OLDEST, export_hf

from ...tiny import draw_pictures
from ...two_llavas import Native

QUESTIONS = ["what color is the shape", "A  red circle?\nOr a blue square", "1234 ünïcodé"]


def pytest_collection_modifyitems(items):
    if Version(transformers.__version__) < Version(OLDEST):
        for item in items:
            if "llava_mixlora/native/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=f"export-hf needs transformers {OLDEST}"))


@pytest.fixture(scope="session")
def tokenizer_folder(exact_tokenizer_folder):
    """One that takes text as it stands, as Llama's does: before transformers 5 the two classes use others otherwise."""
    return exact_tokenizer_folder


@pytest.fixture(scope="session")
def llava_folder(_llava, tokenizer_folder, tmp_path_factory):
    """The tiny LLaVA as a checkpoint with this tokenizer."""
    folder = tmp_path_factory.mktemp("llava-base-exact")
    _llava.save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A square one and a wide one."""
    place = tmp_path_factory.mktemp("pictures")
    draw_pictures(place, 2)
    return [Image.open(place / "0.png").convert("RGB"), Image.open(place / "1.png").convert("RGB").resize((40, 20))]


@pytest.fixture
def exported(tmp_path):
    """Exports a model, and loads the result with its adapter if it has one."""

    def exported(model, base=None, **options):
        folder = tmp_path / "native"
        export_hf(model, folder, base and str(base), **options)
        return Native(folder, folder / "adapter" if base else None)

    return exported
