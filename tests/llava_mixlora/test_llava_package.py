"""Which LLaVA is used: found by what its modules hold, in stand-ins of the forms that forks have."""

import importlib
import sys

import pytest

from llava_mixlora import MixLoraError, llava_package
from llava_mixlora.adapters.llava_config import of_a_whole_model
from llava_mixlora.llava_package import LlavaPackage, is_llava, package_of_program

pytestmark = pytest.mark.one_stack

ARCH = """
import torch
class {name}MetaModel:
    def initialize_vision_modules(self, model_args): ...
class {name}MetaForCausalLM:
    def prepare_inputs_labels_for_multimodal(self, input_ids, attention_mask, past_key_values, labels, images):
        return
"""
MODEL = """
from transformers import AutoConfig, {base}Config, {base}ForCausalLM
from ..{arch} import {name}MetaForCausalLM
class {name}Config({base}Config):
    model_type = "{kind}"
class {name}{base}ForCausalLM({base}ForCausalLM, {name}MetaForCausalLM):
    def forward(self, input_ids): ...
"""
TRAINER = """
from transformers import Trainer
from transformers.trainer import has_length, ShardedDDPOption
class {name}Trainer(Trainer):
    def create_optimizer(self): ...
"""
TRAIN = """
import transformers
from PIL import Image
from {package}.train.{trainer} import {name}Trainer
class TrainingArguments(transformers.TrainingArguments):
    lora_enable: bool = False
class LazySupervisedDataset: ...
def train():
    {name}{base}ForCausalLM.from_pretrained("base")
"""
BUILDER = "def load_pretrained_model(model_path, model_base, model_name): ..."


def write(folder, package, files):
    for name, text in {"__init__.py": "raise ImportError('forks are read, not imported')", **files}.items():
        file = folder / package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """Makes a fork under a name of its own, which an import would find."""

    def fork(package="earthy", base="Llama", more=None):
        words = {"package": package, "name": package.title(), "base": base, "arch": f"{package}_arch"}
        words |= {"trainer": f"{package}_trainer", "kind": package}
        files = {
            f"model/{package}_arch.py": ARCH,
            f"model/language_model/{package}_{base.lower()}.py": MODEL,
            "model/builder.py": BUILDER,
            f"train/{package}_trainer.py": TRAINER,
            "train/train.py": TRAIN,
            "train/train_mem.py": "from {package}.train.train import train",
            "mm_utils.py": "def process_images(): ...\ndef tokenizer_image_token(): ...",
            "conversation.py": "conv_templates = {{}}",
            **(more or {}),
        }
        write(tmp_path, package, {name: text.format(**words) for name, text in files.items()})
        return LlavaPackage(package)

    monkeypatch.syspath_prepend(tmp_path)
    yield fork
    importlib.invalidate_caches()


def test_parts_of_a_fork_are_found_under_its_own_names(fork):
    package = fork()
    assert {part: package.places(part) for part in PLACES} == PLACES
    assert "earthy" not in sys.modules


PLACES = {
    "llava.train.train:TrainingArguments": ("earthy.train.train:TrainingArguments",),
    "llava.train.train:Image": ("earthy.train.train:Image",),
    "llava.train.train:LlavaLlamaForCausalLM": ("earthy.train.train:EarthyLlamaForCausalLM",),
    "llava.train.llava_trainer:LLaVATrainer.__init__": ("earthy.train.earthy_trainer:EarthyTrainer.__init__",),
    "llava.model.llava_arch:torch": ("earthy.model.earthy_arch:torch",),
    "llava.model.llava_arch:LlavaMetaModel.initialize_vision_modules": (
        "earthy.model.earthy_arch:EarthyMetaModel.initialize_vision_modules",
    ),
    "llava.model.builder:load_pretrained_model": ("earthy.model.builder:load_pretrained_model",),
    "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.forward": (
        "earthy.model.language_model.earthy_llama:EarthyLlamaForCausalLM.forward",
    ),
    "llava.mm_utils:process_images": ("earthy.mm_utils:process_images",),
    "llava.serve.cli:load_pretrained_model": (),
    "transformers.trainer:Trainer": ("transformers.trainer:Trainer",),
}


def test_parts_that_lie_elsewhere_are_found_by_what_they_define(fork):
    moved = {
        "mm_utils.py": "",
        "util/pictures.py": "def process_images(): ...\ndef tokenizer_image_token(): ...",
        "util/data.py": "from PIL import Image\nclass LazySupervisedDataset: ...",
        "train/train.py": TRAIN.replace("class LazySupervisedDataset: ...\n", "").replace(
            "from PIL import Image\n", ""
        ),
    }
    package = fork(more=moved)
    assert package.places("llava.mm_utils:process_images") == ("earthy.util.pictures:process_images",)
    assert package.places("llava.train.train:Image") == ("earthy.util.data:Image",)
    found = package.places("llava.train.train:LazySupervisedDataset.__getitem__")
    assert found == ("earthy.util.data:LazySupervisedDataset.__getitem__",)


def test_class_that_puts_images_in_is_the_one_that_models_inherit(fork):
    unused = ARCH.replace("{name}", "Llava")
    package = fork(more={"model/a_copy_of_llava_arch.py": unused})
    assert package.module("llava.model.llava_arch") == "earthy.model.earthy_arch"


def test_language_model_is_known_by_its_type_or_by_that_of_what_it_is_made_of(fork):
    package = fork(base="Qwen2")
    for model_type in ("earthy", "qwen2"):
        model, own = package.language_model(model_type)
        assert (model.name, own) == ("EarthyQwen2ForCausalLM", "earthy")
    assert package.language_model("llama") is None


def test_fork_that_asks_whether_its_tower_comes_later_is_known(fork):
    assert not fork().may_leave_towers_empty
    asks = ARCH.replace("        return", '        delay = getattr(self.config, "delay_load", False)')
    assert fork("watery", more={"model/watery_arch.py": asks}).may_leave_towers_empty


def test_fork_whose_data_set_takes_several_images_is_known(fork):
    asks = "class LazySupervisedDataset:\n    def __getitem__(self, i):\n        "
    assert not fork().takes_several_images
    for name, test in (("watery", "type(i) is list"), ("airy", "isinstance(i, list)")):
        train = TRAIN.replace("class LazySupervisedDataset: ...", f"{asks}return {test}")
        assert fork(name, more={"train/train.py": train}).takes_several_images
    train = TRAIN.replace("class LazySupervisedDataset: ...", f"{asks}return list(i), isinstance(i, int)")
    assert not fork("fiery", more={"train/train.py": train}).takes_several_images


def test_whole_model_says_what_its_own_loader_needs(fork, monkeypatch):
    asks = ARCH.replace("        return", '        delay = getattr(self.config, "delay_load", False)')
    monkeypatch.setattr(llava_package, "_used", fork(base="Qwen2", more={"model/earthy_arch.py": asks}))
    of_bare = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 8}
    told = {"model_type": "earthy", "architectures": ["EarthyQwen2ForCausalLM"], "hidden_size": 8}
    assert of_a_whole_model(of_bare, has_tower=False) == {**told, "delay_load": True}
    assert of_a_whole_model({"model_type": "earthy"}, has_tower=True) == {"model_type": "earthy", "delay_load": False}
    monkeypatch.setattr(llava_package, "_used", fork("watery"))
    assert of_a_whole_model({"model_type": "watery"}, has_tower=False) == {"model_type": "watery"}


def test_what_trains_is_known_by_what_is_run(fork, tmp_path):
    fork()
    train, mem = (tmp_path / "earthy" / "train" / name for name in ("train.py", "train_mem.py"))
    for path, module in ((train, "earthy.train.train"), (mem, "earthy.train.train_mem"), (mem, None)):
        package = package_of_program(path, module)
        assert package.name == "earthy" and package.trains
    builder = package_of_program(tmp_path / "earthy" / "model" / "builder.py", "earthy.model.builder")
    assert builder.name == "earthy" and not builder.trains


def test_script_uses_the_llava_that_it_imports(fork, tmp_path):
    fork()
    script = tmp_path / "script.py"
    script.write_text("def main():\n    from earthy.model.builder import load_pretrained_model\n")
    assert package_of_program(script).name == "earthy"
    script.write_text("import json, torch\n")
    assert package_of_program(script).name == "llava"


def test_script_finds_the_llava_beside_it(tmp_path):
    write(tmp_path, "besides", {"model/arch.py": ARCH.format(name="B")})
    (tmp_path / "script.py").write_text("import besides\n")
    before = list(sys.path)
    assert package_of_program(tmp_path / "script.py").name == "besides"
    assert sys.path == before


def test_two_llavas_are_named_in_one_line(fork, tmp_path):
    fork(), fork("watery")
    script = tmp_path / "script.py"
    script.write_text("import earthy\nfrom watery import model\n")
    with pytest.raises(
        MixLoraError, match="imports two LLaVAs, earthy .*earthy.* and watery .*take one import out"
    ) as e:
        package_of_program(script)
    assert "\n" not in str(e.value)


def test_packages_that_put_no_images_in_are_no_llavas(fork):
    fork()
    assert is_llava("earthy")
    assert not any(is_llava(name) for name in ("torch", "peft", "json", "no_such_package", "llava_mixlora"))


def test_names_that_a_fork_imports_are_known(fork):
    package = fork()
    assert package.imports("transformers.trainer", "ShardedDDPOption")
    assert not package.imports("transformers.trainer", "Trainer")


def test_missing_part_is_named_with_the_package(fork, monkeypatch):
    monkeypatch.setattr(llava_package, "_used", fork())
    with pytest.raises(MixLoraError, match="earthy, in .*earthy, lacks the like of llava.serve.cli:main, which this"):
        llava_package.part("llava.serve.cli:main")
