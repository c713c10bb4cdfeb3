"""The data of a run is checked by the run's own flags, alike in every process."""

import json

import pytest
from PIL import Image
from torch import distributed
from torch.multiprocessing import spawn
from transformers import AutoTokenizer

from llava_mixlora import llava_package
from llava_mixlora.data.check import check_data
from llava_mixlora.training.run_data import agree, check_run_data, max_lost_share, token_counter

from ...tiny import message_of

TURNS = [{"from": "human", "value": "<image>\nwhat color"}, {"from": "gpt", "value": "red"}]
GOOD, EMPTY = (
    {"image": "1.png", "conversations": [TURNS[0], {"from": "gpt", "value": answer}]} for answer in ("a", "")
)


@pytest.fixture
def flags(tmp_path, patched, llava_folder, clip_folder):
    """Flags of a run on four samples, one of which teaches nothing."""
    Image.new("RGB", (16, 16)).save(tmp_path / "1.png")
    (tmp_path / "data.json").write_text(json.dumps([GOOD, EMPTY, GOOD, GOOD]))
    return {
        "data_path": str(tmp_path / "data.json"),
        "image_folder": str(tmp_path),
        "model_name_or_path": str(llava_folder),
        "vision_tower": str(clip_folder),
        "version": "v1",
        "model_max_length": "256",
    }


def test_losses_are_refused_or_left_out_by_a_flag(flags, capsys):
    assert "1 of 4 entries teach nothing" in message_of(check_run_data, flags)
    assert "an answer is empty" in capsys.readouterr().out
    assert check_run_data({**flags, "max_lost_share": "0.25"}).training.samples == [GOOD] * 3


@pytest.mark.parametrize("share", ["-0.1", "1.1", "some", "nan"])
def test_a_share_that_is_none_is_named(share):
    assert f"--max_lost_share {share}: expected a number from 0" in message_of(
        max_lost_share, {"max_lost_share": share}
    )


def test_an_unknown_check_of_images_is_named(flags):
    message = message_of(check_run_data, {**flags, "check_images": "half"})
    assert "--check_images half: expected one of headers, full, none" in message


def test_tokens_are_counted_by_the_runs_own_tokenizer_and_tower(flags):
    counter = token_counter(flags)
    assert counter.image_tokens == 4 and counter.limit == 256 and counter.version == "v1"
    assert token_counter({**flags, "mm_vision_select_feature": "cls_patch"}).image_tokens == 5


def test_tokens_around_images_are_of_their_own(flags):
    plain, marked = token_counter(flags), token_counter({**flags, "mm_use_im_start_end": "True"})
    assert marked.count(GOOD).tokens == plain.count(GOOD).tokens + 2


def test_a_limit_that_leaves_nothing_is_told(flags):
    message = message_of(check_run_data, {**flags, "model_max_length": "40", "max_lost_share": "1"})
    assert "--model_max_length 40 leaves none to learn" in message and "nothing is left to learn" in message


def test_models_that_are_not_here_yet_leave_tokens_uncounted(flags, capsys):
    assert token_counter({**flags, "model_name_or_path": "/no/such/model"}) is None
    found = check_run_data({**flags, "model_name_or_path": "/no/such/model", "max_lost_share": "1"})
    assert found.training.tokens is None
    assert "supervised" not in capsys.readouterr().out


def test_one_process_of_a_machine_looks_at_images_and_one_of_all_prints(flags, monkeypatch, capsys):
    (flags_of_gone := dict(flags))["image_folder"] = "/no/such/folder"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert check_run_data(flags_of_gone).training.usable == 3 and capsys.readouterr().out == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "no such image" in message_of(check_run_data, flags_of_gone)


def _one_of_two(rank, store, data, results):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = check_data(data, "/no/such/folder" if rank else None, images="headers" if rank else "none", keep=True)
    agree(found)
    (results / f"{rank}.json").write_text(json.dumps([list(found.numbers), found.samples]))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_what_one_process_has_lost_is_lost_in_all(flags, tmp_path):
    text = {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "red"}]}
    data = tmp_path / "data.json"
    data.write_text(json.dumps([text, GOOD, EMPTY, text]))
    spawn(_one_of_two, (tmp_path / "store", data, tmp_path), nprocs=2)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[[0, 3], [text, text]]] * 2


def test_each_process_needs_a_sample(flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    message = message_of(check_run_data, {**flags, "max_lost_share": "1"})
    assert f"{flags['data_path']}: expected at least one conversation for each of 4 processes, got 3" in message


def test_held_out_data_is_checked_like_that_of_training(flags, tmp_path):
    held_out = tmp_path / "held.json"
    held_out.write_text(json.dumps([GOOD, {**GOOD, "image": "2.png"}]))
    flags |= {"max_lost_share": "0.3", "eval_data_path": str(held_out)}
    assert f"{tmp_path}/2.png: no such image" in message_of(check_run_data, flags)
    (tmp_path / "other").mkdir()
    for name in ("1.png", "2.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / "other" / name)
    data = check_run_data({**flags, "eval_image_folder": str(tmp_path / "other")})
    assert data.of(str(held_out)).usable == 2 and data.of(flags["data_path"]) is data.training
    assert data.of("another.json") is None


@pytest.mark.parametrize("package, padding", [("llava", None), ("earthy", "</s>")])
def test_tokenizer_without_an_unknown_token_keeps_its_padding_where_a_fork_asks_for_one(
    flags, monkeypatch, tmp_path, package, padding
):
    from llava_mixlora.training import run_data

    class Tokenizers:
        @staticmethod
        def from_pretrained(path, **how):
            tokenizer = AutoTokenizer.from_pretrained(path, **how)
            tokenizer.unk_token, tokenizer.pad_token = None, "</s>"
            return tokenizer

    monkeypatch.setattr(run_data, "AutoTokenizer", Tokenizers)
    (tmp_path / "earthy" / "train").mkdir(parents=True)
    (tmp_path / "earthy" / "train" / "train.py").write_text(
        "class TrainingArguments: ...\ndef train():\n    if tokenizer.unk_token is not None: ..."
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(run_data, "used", lambda: llava_package.LlavaPackage(package))
    assert token_counter(flags).tokenizer.pad_token == padding
