"""The main job's result in transformers' own LLaVA: the same logits and answers, also where no plugin is installed."""

import json
import subprocess
import sys

import pytest
import transformers
from packaging.version import Version
from PIL import Image

from llava_mixlora.native.export import OLDEST

from ..two_llavas import Native, Upstream

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version(OLDEST), reason=f"export-hf needs transformers {OLDEST}"
    ),
]
QUESTIONS = 20
TOKENS = 8
WITHOUT_PLUGIN = """
import json, sys
sys.modules["llava_mixlora"] = sys.modules["llava"] = None  # importing either fails
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, tokens = sys.argv[1], int(sys.argv[2])
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32")
processor, answers = AutoProcessor.from_pretrained(folder), []
for place, question in json.load(sys.stdin):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(place).convert("RGB"), text=text, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs.input_ids.shape[1] :]
    answers.append(processor.decode(written, skip_special_tokens=True).strip())
json.dump(answers, sys.stdout)
"""


def command(*words):
    done = subprocess.run([sys.executable, "-m", "llava_mixlora", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def held_out(cache):
    """Questions about held-out pictures, evenly of all tasks."""
    data = json.loads((cache / "data" / "heldout.json").read_text())
    samples = data[:: len(data) // QUESTIONS][:QUESTIONS]
    assert len({sample["task"] for sample in samples}) >= 6
    questions = [sample["conversations"][0]["value"].replace("<image>\n", "") for sample in samples]
    return [(str(cache / "data" / "images" / s["image"]), question) for s, question in zip(samples, questions)]


def largest_difference(cache, adapter, folder):
    """Over held-out questions, between the two classes' logits; their answers are the same."""
    upstream, native = Upstream(cache / "llava-v1-tiny", adapter), Native(folder, folder / "adapter")
    differences = []
    for place, question in held_out(cache):
        picture = Image.open(place).convert("RGB")
        expected, found = upstream.logits(picture, question, version="llava_v1"), native.logits(picture, question)
        assert found.shape[1] == expected.shape[1]
        differences.append(float((found[..., : expected.shape[-1]] - expected).abs().max()))
        answer = upstream.answer(picture, question, version="llava_v1", tokens=TOKENS)
        assert native.answer(picture, question, tokens=TOKENS) == answer
    return max(differences)


def test_an_exported_adapter_answers_as_upstreams_model(main_job, patched, tmp_path):
    place, _ = main_job
    adapter, folder = place / "llava-v1-out", tmp_path / "native"
    said = command("export-hf", "--model-path", adapter, "--save-model-path", folder)
    assert str(folder / "adapter") in said
    assert largest_difference(place / "cache", adapter, folder) < 1e-4


def test_a_merged_one_answers_where_there_is_no_plugin(main_job, patched, tmp_path):
    place, _ = main_job
    merged, folder = tmp_path / "llava-merged", tmp_path / "native"
    words = [
        "--model-path",
        place / "llava-v1-out",
        "--save-model-path",
        merged,
        "--method",
        "mean",
        "--samples",
        "24",
        "--force",
    ]
    command("merge", *words)
    command("export-hf", "--model-path", merged, "--save-model-path", folder)
    asked = held_out(place / "cache")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN, str(folder), str(TOKENS)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    upstream = Upstream(merged)
    pictures = [(Image.open(picture).convert("RGB"), question) for picture, question in asked]
    expected = [upstream.answer(*each, version="llava_v1", tokens=TOKENS) for each in pictures]
    assert json.loads(done.stdout) == expected
