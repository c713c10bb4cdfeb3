"""Upstream's programs ask a model as it was trained, unless told otherwise."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from llava_mixlora.adapters.adapter_record import AdapterRecord
from llava_mixlora.adapters.model_choices import AS_NAMED, ModelChoices
from llava_mixlora.inference.conversation import conversation_of
from llava_mixlora.inference.program_arguments import program_arguments

from ...tiny import message_of

pytestmark = pytest.mark.one_stack

LLAVA = Path(find_spec("llava").origin).parent
ASKS = ["serve/cli.py", "eval/run_llava.py", "eval/model_vqa.py", "eval/model_vqa_loader.py"]
ASKS += ["eval/model_vqa_science.py", "eval/model_vqa_mmbench.py"]


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "renamed"
    folder.mkdir()
    AdapterRecord(conversation="v1").save(folder)
    return str(folder)


@pytest.mark.parametrize("program", ASKS)
def test_template_is_that_of_training_whatever_the_folder_is_called(adapter, program):
    words = ["--model-path", adapter, "--temperature", "0"]
    assert program_arguments(LLAVA / program, words) == ([*words, "--conv-mode", "v1"], AS_NAMED)


@pytest.mark.parametrize("words", [["--conv-mode", "llava_v0"], ["--conv-mode=llava_v0"], ["--conv", "llava_v0"]])
def test_template_that_the_user_says_is_named_once_and_taken(adapter, words, capsys):
    words = [f"--model-path={adapter}", *words]
    assert program_arguments(LLAVA / "serve/cli.py", words) == (words, AS_NAMED)
    (line,) = capsys.readouterr().out.splitlines()
    assert "--conv-mode llava_v0" in line and adapter in line and "trained with v1" in line


def test_same_template_by_another_name_is_no_other(adapter, capsys):
    assert conversation_of(adapter, "vicuna_v1", "--conv-mode", "") == "vicuna_v1"
    assert capsys.readouterr().out == ""


def test_template_that_llava_does_not_have_is_one_line(adapter):
    AdapterRecord(conversation="v9").save(adapter)
    words = ["--model-path", adapter]
    message = message_of(program_arguments, LLAVA / "serve/cli.py", words)
    assert adapter in message and "'v9'" in message and "--conv-mode" in message
    assert conversation_of(adapter, "v1", "--conv-mode", "") == "v1"


def test_model_without_a_record_is_left_to_the_program(tmp_path, capsys):
    words = ["--model-path", str(tmp_path)]
    assert program_arguments(LLAVA / "serve/cli.py", words) == (words, AS_NAMED)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("template", "part"), [("v1", "v1"), ("llava_llama_2", "llama-2"), ("mistral_instruct", "mistral")]
)
def test_worker_is_named_so_that_the_page_takes_the_template(adapter, template, part):
    AdapterRecord(conversation=template).save(adapter)
    words = ["--model-path", adapter]
    assert program_arguments(LLAVA / "serve/model_worker.py", words)[0] == [
        *words,
        "--model-name",
        f"llava-{part}-renamed",
    ]
    said = [*words, "--model-name", "mine"]
    assert program_arguments(LLAVA / "serve/model_worker.py", said)[0] == said


def test_worker_whose_name_tells_keeps_it(tmp_path):
    checkpoint = tmp_path / "llava-v1-mine" / "checkpoint-10"
    checkpoint.mkdir(parents=True)
    AdapterRecord(conversation="v1").save(checkpoint)
    words = ["--model-path", str(checkpoint)]
    assert program_arguments(LLAVA / "serve/model_worker.py", words)[0] == words


def test_what_is_said_to_the_plugin_does_not_reach_the_program(adapter):
    words = [
        "--vision-tower=clip",
        "--model-path",
        adapter,
        "--allow-other-base",
        "--allow-incomplete",
        "--conv-mode",
        "v1",
    ]
    left, choices = program_arguments(LLAVA / "serve/cli.py", words)
    assert left == ["--model-path", adapter, "--conv-mode", "v1"]
    assert choices == ModelChoices(vision_tower="clip", allow_other_base=True, allow_incomplete=True)


def test_training_keeps_all_its_words():
    words = ["--vision_tower", "clip", "--allow-other-base"]
    assert program_arguments(LLAVA / "train" / "train.py", words) == (words, AS_NAMED)


LMMS = Path("site-packages", "lmms_eval", "__main__.py")


@pytest.mark.parametrize("said", ["", ",conv_template=llava_v0"])
def test_lmms_eval_takes_it_too(adapter, said):
    words = ["--model", "llava", "--model_args", f"pretrained={adapter},device=cpu{said}", "--tasks", "mme"]
    left, choices = program_arguments(LMMS, [*words, "--allow-other-base"])
    assert choices.allow_other_base and left[-2:] == ["--tasks", "mme"]
    assert left[left.index("--model_args") + 1] == f"pretrained={adapter},device=cpu{said or ',conv_template=v1'}"


def test_other_models_of_lmms_eval_are_left_alone(adapter):
    words = ["--model", "qwen", "--model_args", f"pretrained={adapter}"]
    assert program_arguments(LMMS, words)[0] == words
