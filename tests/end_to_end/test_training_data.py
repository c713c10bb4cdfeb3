"""Training data as people have it, given to real runs: trained on, repaired, left out or refused, and told."""

import json
import subprocess

import pytest
from PIL import Image

from .training import ALONE, PLUGIN, environment, write_inputs

TRUNCATED = 60  # bytes that are left of an image


def turns(*texts, speakers=("human", "gpt"), names=("from", "value")):
    return [dict(zip(names, (speakers[place % 2], text), strict=True)) for place, text in enumerate(texts)]


def sample(*texts, image="0.png", **fields):
    return {**({"image": image} if image else {}), "conversations": turns(*texts), **fields}


GOOD = sample("<image>\nwhat color is the shape?", "red")
LOST = {
    "eos": sample("<image>\nwhat", "red</s>"),
    "role in the text": sample("<image>\nwhat", "red ASSISTANT: blue"),
    "empty answer": sample("<image>\nwhat", ""),
    "empty question": sample("", "red"),
    "empty in the middle": sample("<image>\nwhat", "", "and", "blue"),
    "too long": sample("<image>\n" + "what " * 300, "red"),
    "too long, text alone": sample("what " * 300, "red", image=None),
    "no image": sample("<image>\nwhat", "red", image=None),
    "images": {**sample("<image>\nwhat", "red", image=None), "images": ["0.png"]},
    "two marks": sample("<image>\n<image>\nwhat", "red"),
    "two images": sample("<image>\n<image>\nwhat", "red", image=["0.png", "1.png"]),
    "mark in the answer": sample("what", "<image> red"),
    "another mark": sample("<Image>\nwhat", "red"),
    "number": sample("<image>\nwhat", 3),
    "system": {"conversations": [{"from": "system", "value": "be brief"}, *turns("what", "red")]},
    "one speaker": {"conversations": turns("what", "red", speakers=("gpt", "gpt"))},
    "no conversation": {"id": 1},
    "no entry": 3,
    "missing": sample("<image>\nwhat", "red", image="gone.png"),
    "url": sample("<image>\nwhat", "red", image="https://example.com/a.png"),
    "folder": sample("<image>\nwhat", "red", image="."),
    "truncated": sample("<image>\nwhat", "red", image="truncated.png"),
    "empty file": sample("<image>\nwhat", "red", image="empty.png"),
    "no picture": sample("<image>\nwhat", "red", image="train.json"),
    "thin": sample("<image>\nwhat", "red", image="thin.png"),
}
REPAIRED = {
    "null": {**sample("<image>\nwhat color", "red"), "image": None},
    "no mark": sample("what color", "red"),
    "ends with a question": sample("<image>\nwhat color", "red", "and"),
}
KEPT = {
    "several turns": sample("<image>\nwhat color", "red", "and", "blue"),
    "begins with an answer": {"image": "0.png", "conversations": turns("hello", "<image>\nwhat", "red")},
    "user, assistant": {"conversations": turns("what", "red", speakers=("user", "assistant"))},
    "role, content": {"messages": turns("what", "red", speakers=("user", "assistant"), names=("role", "content"))},
    "list of one": sample("<image>\nwhat color", "red", image=["1.png"]),
    "turned": sample("<image>\nwhat color", "red", image="turned.jpg"),
    "sixteen bits": sample("<image>\nwhat color", "red", image="gray.png"),
}
KEPT["begins with an answer"]["conversations"] = turns("hello", "<image>\nwhat", "red", speakers=("gpt", "human"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, _llava, clip_folder, tokenizer_folder):
    """What all runs are told, and their folder: four good samples, and images of all kinds."""
    place = tmp_path_factory.mktemp("inputs")
    flags = write_inputs(place, _llava, clip_folder, tokenizer_folder, ["red", "green", "blue", "red"])
    (place / "truncated.png").write_bytes((place / "0.png").read_bytes()[:TRUNCATED])
    (place / "empty.png").touch()
    Image.new("RGB", (4000, 1)).save(place / "thin.png")
    Image.new("I;16", (16, 16), 60_000).save(place / "gray.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(place / "turned.jpg", exif=exif)
    return place, [*flags, "--mixlora_enable=True", "--max_steps=2", "--save_strategy=no", "--num_train_epochs=1"]


def start(command, *words):
    return subprocess.run([*command, *map(str, words)], env=environment(), capture_output=True, text=True)


def errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("llava-mixlora: error: ")]


@pytest.fixture(scope="module")
def findings(inputs):
    """What `check` says of a file for each kind, by kind: in each, the entry 1 of 5 is of that kind."""
    place, _ = inputs
    kinds = {**LOST, **REPAIRED, **KEPT}
    files = [place / f"kind-{number}.json" for number in range(len(kinds))]
    for file, entry in zip(files, kinds.values(), strict=True):
        file.write_text(json.dumps([GOOD, entry, GOOD, GOOD, GOOD]))
    flags = ["--image-folder", place, "--model-path", place / "llava", "--model-max-length", 256, "--max-lost-share", 1]
    done = start(PLUGIN, "check", *files, *flags, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(kinds, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("kind", LOST)
def test_samples_that_teach_nothing_are_found(findings, kind):
    found = findings[kind]
    assert found["samples"] == 4 and list(found["lost"].values()) == [{"count": 1, "first_entries": [1]}], found


@pytest.mark.parametrize("kind", REPAIRED)
def test_samples_that_can_be_repaired_are(findings, kind):
    found = findings[kind]
    assert found["samples"] == 5 and list(found["repaired"].values()) == [{"count": 1, "first_entries": [1]}], found


@pytest.mark.parametrize("kind", KEPT)
def test_other_forms_are_understood(findings, kind):
    assert findings[kind]["samples"] == 5 and not findings[kind]["repaired"], findings[kind]


def test_a_run_on_data_of_which_too_much_is_lost_ends_in_one_line(inputs, tmp_path):
    place, flags = inputs
    (tmp_path / "data.json").write_text(json.dumps([GOOD, GOOD, LOST["eos"]]))
    done = start(ALONE, *flags, f"--data_path={tmp_path / 'data.json'}", f"--output_dir={tmp_path / 'out'}")
    (line,) = errors(done)
    assert done.returncode == 1 and "entry 2: its text has '</s>'" in line and "1 of 3 entries teach nothing" in line
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert "nothing to learn          1  a mark of the template in the text; entry 2" in done.stdout


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A run on JSON Lines with a byte order mark: everything that is kept or repaired, and one loss that is allowed."""
    place, flags = inputs
    folder = tmp_path_factory.mktemp("trained")
    lines = [*KEPT.values(), *REPAIRED.values(), LOST["too long"], *[GOOD] * 5]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8-sig")
    wanted = ["--max_lost_share=0.1", "--per_device_train_batch_size=8", "--dataloader_num_workers=1"]
    done = start(ALONE, *flags, f"--data_path={folder / 'data.jsonl'}", f"--output_dir={folder / 'out'}", *wanted)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done


def test_what_can_be_trained_on_is(trained):
    folder, done = trained
    assert (folder / "out" / "adapter_model.safetensors").is_file()
    assert "16 entries" in done.stdout and "nothing to learn          1  cut off before its answer" in done.stdout
    assert done.stdout.count("repaired  ") == 3 and "tokenization mismatch" not in done.stdout
    card = (folder / "out" / "README.md").read_text()
    assert "data.jsonl" in card and "15" in card


def test_a_sample_that_breaks_during_training_is_named_in_one_line(inputs, tmp_path):
    place, flags = inputs
    (tmp_path / "data.json").write_text(json.dumps([GOOD, LOST["truncated"]]))
    unchecked = ["--check_images=none", "--dataloader_num_workers=1", "--per_device_train_batch_size=2"]
    done = start(ALONE, *flags, f"--data_path={tmp_path / 'data.json'}", f"--output_dir={tmp_path / 'out'}", *unchecked)
    (line,) = errors(done)
    assert done.returncode == 1 and f"{tmp_path / 'data.json'}: entry 1: {place / 'truncated.png'}: damaged" in line
