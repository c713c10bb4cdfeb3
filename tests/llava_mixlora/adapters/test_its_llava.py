"""A model is asked with the LLaVA that trained it, and loaded by no other."""

import sys

import pytest

from llava_mixlora import MixLoraError, llava_package
from llava_mixlora.adapters.adapter_record import AdapterRecord
from llava_mixlora.adapters.its_llava import check_is_its_llava, use_its_llava
from llava_mixlora.inference.conversation import conversation_of
from llava_mixlora.llava_package import LlavaPackage, use

pytestmark = pytest.mark.one_stack


@pytest.fixture
def adapter(tmp_path, monkeypatch, patched):
    """A folder with the record of an adapter that another LLaVA has trained, and that LLaVA."""
    package = tmp_path / "windy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "arch.py").write_text("class Meta:\n    def prepare_inputs_labels_for_multimodal(self): ...")
    (package / "conversation.py").write_text("conv_templates = {'of_the_wind': None}")
    monkeypatch.syspath_prepend(tmp_path)
    before = llava_package.used()
    (tmp_path / "adapter").mkdir()
    AdapterRecord(conversation="of_the_wind", package="windy").save(tmp_path / "adapter")
    yield tmp_path / "adapter"
    use(before)
    for name in [each for each in sys.modules if each.partition(".")[0] == "windy"]:
        del sys.modules[name]


def test_program_of_another_llava_does_not_load_it(adapter):
    with pytest.raises(MixLoraError, match="'windy' trained it, and llava is about to load it; .* -m windy.serve.cli"):
        check_is_its_llava(adapter)
    use_its_llava(adapter)
    check_is_its_llava(adapter)
    assert llava_package.used() == LlavaPackage("windy")


def test_template_of_its_training_is_looked_up_in_its_own_llava(adapter):
    assert conversation_of(adapter, None, "--conv-mode", otherwise="v1") == "of_the_wind"
