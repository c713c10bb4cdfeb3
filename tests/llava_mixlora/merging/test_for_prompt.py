"""`llava-mixlora export-lora --for-prompt`: LLaVA's own loader answers the prompt as the adapter does."""

import json

import pytest
import torch
from peft import LoraConfig
from PIL import Image

from llava_mixlora.cli import main
from llava_mixlora.evaluation.answering import inputs_of
from llava_mixlora.inference.loading import load_for_inference

from ...tiny import draw_pictures, write_adapter

QUESTION = "what color is the shape?"
OTHERS = ["red green blue " * 8, "circle " * 12, "between a square and a human " * 6]
FORMS = [
    {},
    {"pairing": "same", "router_scope": "instruction", "router_input": "hidden"},
    {"pairing": "same", "router_input": "words"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    draw_pictures(place, 2)
    return place


def export(adapter, output, *words, image="0.png", question=QUESTION, place):
    said = ["export-lora", "--model-path", adapter, "--save-model-path", output, "--image-folder", place, *words]
    return main([str(word) for word in (*said, "--for-prompt", image, question)])


def logits(loaded, place, question=QUESTION, picture="0.png"):
    with torch.no_grad(), Image.open(place / picture) as image:
        return loaded[1](**inputs_of(loaded, [question], [image.convert("RGB")], "v1")).logits


@pytest.mark.parametrize("form", FORMS)
def test_exported_lora_says_what_the_adapter_says_to_its_prompt(llava_folder, place, tmp_path, capsys, form):
    adapter = write_adapter(llava_folder, tmp_path / "llava-mixlora", **form)
    exported = tmp_path / "llava-prompt-lora"
    assert export(adapter, exported, place=place) == 0
    told = capsys.readouterr().out
    assert "exact for this prompt and its answer" in told and "export-hf" in told
    dynamic, plain = load_for_inference(adapter), load_for_inference(exported, keep_adapter=True)
    (config,) = plain[1].peft_config.values()
    assert type(config) is LoraConfig and config.r == dynamic[1].peft_config["default"].r
    torch.testing.assert_close(logits(plain, place), logits(dynamic, place), rtol=1e-5, atol=1e-5)
    apart = [(logits(plain, place, other) - logits(dynamic, place, other)).abs().max() for other in OTHERS]
    assert max(apart) > 1e-3


def refusal(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llava-mixlora: error: ")]
    return line


@pytest.mark.parametrize(
    "words, given, expected",
    [
        (["--method", "mean"], {}, "--for-prompt with --method mean"),
        (["--version", "none_such"], {}, "--version none_such: no such template"),
        ([], {"image": "gone.png"}, "gone.png"),
        ([], {"question": " "}, "the question is empty"),
    ],
)
def test_what_has_no_lora_of_a_prompt_is_named(llava_folder, place, tmp_path, capsys, words, given, expected):
    adapter = write_adapter(llava_folder, tmp_path / "llava-mixlora")
    assert export(adapter, tmp_path / "out", *words, place=place, **given) == 1
    assert expected in refusal(capsys) and not (tmp_path / "out").exists()


def test_adapter_that_routes_every_step_is_refused(llava_folder, place, tmp_path, capsys):
    adapter = write_adapter(llava_folder, tmp_path / "llava-mixlora")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "decode_routing": "step"}))
    assert export(adapter, tmp_path / "out", place=place) == 1
    assert "decode_routing='step'" in refusal(capsys) and not (tmp_path / "out").exists()
