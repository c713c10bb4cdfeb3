"""Whatever is damaged in what people download or keep: it is refused in one line, or what it was is what is read.

200 cases, or as many as MIXLORA_FUZZ_CASES says; the same ones in each run. What has become of them is printed.
"""

import contextlib
import copy
import json
import random
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import HfArgumentParser
from transformers.trainer_callback import TrainerState

from llava_mixlora import MixLoraConfig, MixLoraError
from llava_mixlora.adapters.adapter_folder import NON_LORA_TRAINABLES, NOT_THE_LANGUAGE_MODEL, write_non_lora_trainables
from llava_mixlora.adapters.adapter_record import RECORD, AdapterRecord, known_model, read_record
from llava_mixlora.adapters.base_check import check_base, check_tower
from llava_mixlora.adapters.inspect_adapter import describe
from llava_mixlora.adapters.llava_config import llava_config
from llava_mixlora.adapters.model_places import base_model_of
from llava_mixlora.adapters.plain_lora import OF_LORA
from llava_mixlora.adapters.reading import read, read_any_config
from llava_mixlora.data.check import check_data
from llava_mixlora.data.conversations import read_conversations
from llava_mixlora.data.kept_calibration import KEPT, keep_calibration, kept_calibration
from llava_mixlora.evaluation.evaluate import _collect, scores, table
from llava_mixlora.evaluation.judge import judge_answers
from llava_mixlora.evaluation.questions import read_questions
from llava_mixlora.inference.samples import SampleSource, samples_by_task
from llava_mixlora.training import checkpoint, resuming
from llava_mixlora.training.continuing import continued_config, words_of_adapter

from ..fuzzing import HEADER_DAMAGES, JSON_DAMAGES, PICKLE_DAMAGES, TENSOR_DAMAGES, Counts, cases, damage, in_file
from ..tiny import LINEAR_LAYERS, draw_pictures, plain, randomise, write_adapter

WEIGHTS, CONFIG, STATE = "adapter_model.safetensors", "adapter_config.json", "trainer_state.json"
TRAINED = {"epoch": 1.0, "global_step": 4, "max_steps": 8, "num_train_epochs": 2, "logging_steps": 1}
HISTORY = [{"epoch": 0.5, "loss": 2.5, "step": 2}, {"epoch": 1.0, "loss": float("nan"), "step": 4}]
STATE_CONTENT = {**TRAINED, "log_history": HISTORY, "stateful_callbacks": {}, "best_metric": None}
SAMPLES = [
    {
        "id": f"s{number}",
        "image": f"{number % 4}.png",
        "task": ("color", "shape")[number % 2],
        "conversations": [
            {"from": "human", "value": f"<image>\nwhat is {number}?"},
            {"from": "gpt", "value": ["red", "blue"][number % 2]},
        ],
    }
    for number in range(8)
]
FLAGS = ["--output_dir=out", "--data_path=train.json", "--max_steps=8", "--learning_rate=0.01", "--use_cpu=True"]


@pytest.fixture(scope="module")
def stage(llava_folder, clip_folder, patched, tmp_path_factory):
    """What is damaged: adapters, an output folder with two checkpoints, questions and data; each case has a copy."""
    place = tmp_path_factory.mktemp("fuzz")
    _write_adapters(place, llava_folder, clip_folder)
    run, config = _write_checkpoints(place, llava_folder)
    _write_texts(place)
    kinds = ("mixlora", "words", "lora")
    return SimpleNamespace(
        place=place,
        base=str(llava_folder),
        tower=str(clip_folder),
        model=plain(llava_folder),
        run=run,
        config=config,
        originals={kind: _tensors(place / kind) for kind in kinds}
        | {name: _tensors(place / "run" / name) for name in ("checkpoint-2", "checkpoint-4")},
    )


def _write_adapters(place, base, tower):
    torch.manual_seed(0)
    write_adapter(base, place / "mixlora")
    options = {"target_modules": LINEAR_LAYERS, "task_type": "CAUSAL_LM"}
    configs = {
        "words": MixLoraConfig(
            r=2, num_factors=6, exclude_modules=NOT_THE_LANGUAGE_MODEL, base_model_name_or_path=str(base), **options
        ),
        "lora": LoraConfig(r=3, base_model_name_or_path=str(base), **options),
    }
    for name, config in configs.items():
        randomise(get_peft_model(plain(base), config)).save_pretrained(place / name)
        shutil.copy(place / "mixlora" / "config.json", place / name)
    beside = torch.load(place / "mixlora" / NON_LORA_TRAINABLES, weights_only=True)
    record = AdapterRecord(
        "v1",
        known_model(str(base)),
        known_model(str(tower)),
        {"image_aspect_ratio": "pad"},
        {"name": "d", "samples": 8},
    )
    for name in ("mixlora", *configs):
        write_non_lora_trainables(place / name, beside)
        (place / name / STATE).write_text(json.dumps(STATE_CONTENT))
        record.save(place / name)
        keep_calibration(place / name, SAMPLES, 4, "train.json", str(place), "v1", 0)


def _write_checkpoints(place, base):
    from llava.train import train

    parser = HfArgumentParser((train.ModelArguments, train.DataArguments, train.TrainingArguments))
    run, output = resuming.describe_run(vars(parser.parse_args(FLAGS)), SAMPLES, 1), place / "run"
    for step in (2, 4):
        torch.manual_seed(step)
        folder = write_adapter(base, checkpoint.unfinished(output) / f"checkpoint-{step}")
        write_non_lora_trainables(folder, torch.load(folder / NON_LORA_TRAINABLES, weights_only=True))
        state = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}
        torch.save(state, folder / "optimizer.pt")
        torch.save({"last_epoch": step, "_last_lr": [0.1]}, folder / "scheduler.pt")
        torch.save({"python": random.getstate(), "cpu": torch.get_rng_state()}, folder / "rng_state.pth")
        (folder / STATE).write_text(json.dumps({**STATE_CONTENT, "global_step": step}))
        resuming.write_run(run, folder)
        checkpoint.publish(output, folder.name)
    return run, MixLoraConfig.from_pretrained(output / "checkpoint-4")


def _write_texts(place):
    for name in ("questions", "data"):
        (place / name).mkdir()
        draw_pictures(place / name, 4)
    asked = [{"question_id": n, "text": "what?", "image": f"{n}.png", "label": "yes"} for n in range(4)]
    of_authors = [{"unique_id": f"q{n}", "prompt": "what?", "target": "x", "image_path": f"{n}.png"} for n in range(4)]
    for name, lines in {"asked.jsonl": asked, "authors.jsonl": of_authors, "lines.json": asked}.items():
        (place / "questions" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(place / "questions", place / "answers" / "questions")
    texts = [("yes", "no")[number % 2] for number in range(4)]
    answers = [{"question_id": str(n), "prompt": "what?", "text": text} for n, text in enumerate(texts)]
    judged = [{"key": ["judge", str(n), "yes", text], "right": text == "yes"} for n, text in enumerate(texts)]
    for name, lines in {"answers.jsonl": answers, "answers.part-0.jsonl": answers, "judged.jsonl": judged}.items():
        (place / "answers" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for folder in ("questions", "data"):
        (place / folder / "list.json").write_text(json.dumps(SAMPLES))
        (place / folder / "lines.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in SAMPLES))


def _tensors(folder):
    adapter = read(folder)
    return SimpleNamespace(own={name: each.clone() for name, each in adapter.tensors()}, beside=adapter.beside)


# --- what is checked of each case -------------------------------------------------------------------------------------


class Doors:
    """Each door is gone through, whatever those before it say; the first refusal is the case's."""

    def __init__(self):
        self.refusals = []

    @contextlib.contextmanager
    def each(self):
        try:
            yield
        except MixLoraError as error:
            if len(str(error).splitlines()) != 1:
                raise
            self.refusals.append(str(error))  # the error itself holds what it was found in

    def close(self):
        if self.refusals:
            raise MixLoraError(self.refusals[0])


@contextlib.contextmanager
def copy_of(stage, name):
    """A copy that may be damaged, with the marker that code in a pickle would make; none may be there afterwards."""
    place = stage.place / "case"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(stage.place / name, place / name)
    yield place / name, place / "marker"
    assert not (place / "marker").exists()


def same(found, wanted, may_lack=""):
    """Assert that tensors are those they were, if in another dtype; some may be lacking, or zero."""
    assert set(found) <= set(wanted), f"holds {sorted(set(found) - set(wanted))[:3]}"
    lacks = [name for name in wanted if name not in found and not (may_lack and may_lack in name)]
    assert not lacks, f"lacks {lacks[:3]}"
    for name, tensor in found.items():
        if may_lack and may_lack in name and not tensor.any():
            continue
        dtypes = {tensor.dtype, *((torch.float16, torch.bfloat16) if tensor.is_floating_point() else ())}
        assert any(torch.equal(tensor, wanted[name].to(dtype).to(tensor.dtype)) for dtype in dtypes), f"{name} differs"


def says_its_file(config, folder):
    """Assert that a configuration is what its file says, and makes nothing of its own of it."""
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for name, value in fields.items():
        is_taken = config.peft_type != "LORA" or name in OF_LORA
        if value in (None, [], {}, "") or not hasattr(config, name) or name == "format_version" or not is_taken:
            continue
        found = getattr(config, name)
        value = set(value) if isinstance(found, set) else value
        assert found == value, f"{name}={found!r:.80} of the file's {value!r:.80}"


def adapter_doors(stage, folder, kind, touched):
    doors, wanted = Doors(), stage.originals[kind]
    is_left_to_base = bool({"config.json"} & touched)

    def same_beside(found):
        if not (is_left_to_base and not found):
            same(found, wanted.beside)

    for base in (stage.base, None):
        with doors.each():
            adapter = read(folder, base)
            same(dict(adapter.tensors()), wanted.own, "mixlora_stats")
            same_beside(adapter.beside)
            says_its_file(adapter.config, folder)
    if kind != "lora":
        with doors.each():
            list(describe(folder))
    if _says_mixlora(folder):  # else PEFT takes it for another's adapter
        with doors.each(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(copy.deepcopy(stage.model), str(folder))
            loaded = get_peft_model_state_dict(model)  # with bias="all" those of the base, too
            own = {name: tensor for name, tensor in loaded.items() if "mixlora_" in name or name in wanted.own}
            same(own, wanted.own, "mixlora_stats")
    for door in (
        lambda: read_any_config(folder),
        lambda: llava_config(folder),
        lambda: read_record(folder),
        lambda: check_base(folder, stage.base),
        lambda: check_tower(folder, stage.tower),
        lambda: kept_calibration(folder),
        lambda: base_model_of(folder),
        lambda: continued_config(folder, {"lora_dropout": 0.1, "tasks": None}),
        lambda: words_of_adapter(_going_on_from(folder, stage)),
    ):
        with doors.each():
            door()
    doors.close()


def _says_mixlora(folder):
    try:
        file = folder / CONFIG
        text = file.read_text(encoding="utf-8") if file.is_file() and file.stat().st_size < 1 << 20 else ""
        return json.loads(text)["peft_type"] == "MIXLORA"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _going_on_from(folder, stage):
    return [f"--mixlora_init_from={folder}", "--mixlora_enable=True", f"--model_name_or_path={stage.base}"]


def checkpoint_doors(stage, output):
    doors, newest = Doors(), output / "checkpoint-4"
    with doors.each():
        resuming.check_resuming(output, stage.run, stage.config)
    with doors.each():
        resuming.finished(output, stage.run)
        resuming.is_written(output, newest)
    with doors.each():
        words_of_adapter(
            [f"--mixlora_init_from={newest}", "--mixlora_enable=True", f"--model_name_or_path={stage.base}"]
        )
    with doors.each():
        chosen = checkpoint.newest_whole(output, resuming.check_usable)
        found = _tensors(chosen)
        wanted = stage.originals[chosen.name]
        same(found.own, wanted.own, "mixlora_stats")
        same(found.beside, wanted.beside)
        says_its_file(read_any_config(chosen), chosen)
        state = TrainerState.load_from_json(str(chosen / STATE))
        assert isinstance(state.global_step, int) and isinstance(state.log_history, list)
        if chosen.name != newest.name:
            raise MixLoraError("goes on from the checkpoint before it")
    doors.close()


def question_doors(file):
    questions = read_questions(file)
    assert len({question.id for question in questions}) == len(questions)
    for question in questions:
        assert isinstance(question.prompt, str) and isinstance(question.target, (str, type(None)))
        assert isinstance(question.id, str) and isinstance(question.task, str) and question.image.is_file()
        json.dumps([question.id, question.prompt, question.target, str(question.image)]).encode()


def answer_doors(file):
    questions, output = read_questions(file.parent / "questions" / "asked.jsonl"), file.parent
    answers = _collect(output, questions)
    for question in questions:
        answers.setdefault(question.id, {"text": ""})
    judged = judge_answers("judge", questions, answers, output, 1)
    table(scores(questions, answers, judged))
    assert all(
        type(answers[question.id]["text"]) is str and type(judged[question.id]) is bool for question in questions
    )


def data_doors(file):
    doors, originals = Doors(), {sample["id"]: sample for sample in SAMPLES}
    with doors.each():
        found = check_data(file, file.parent, keep=True)
        found.refuse_losses(0.2)
        assert len(found.samples) == found.usable
        resuming.describe_run({}, found.samples, 1)
        json.dumps([found.table(), found.to_dict()])
        for sample in found.samples:
            assert (file.parent / sample["image"]).is_file() if "image" in sample else True
            for turn in sample["conversations"]:
                assert turn["from"] in ("human", "gpt") and turn["value"].encode()
        same_ones = [sample for sample in found.samples if originals.get(str(sample.get("id"))) == sample]
        assert len(same_ones) >= found.usable - 2
    with doors.each():
        read_conversations(file)
    with doors.each():
        samples_by_task(SampleSource(str(file), str(file.parent), samples=3))
    doors.close()


def told(counts, capsys, record_property):
    with capsys.disabled():
        print(f"\n{counts}", end="")
    record_property(counts.kind, str(counts))
    counts.check()


ADAPTER_DAMAGES = st.one_of(
    in_file(CONFIG, JSON_DAMAGES),
    in_file("config.json", JSON_DAMAGES),
    in_file(RECORD, JSON_DAMAGES),
    in_file(STATE, JSON_DAMAGES),
    in_file(KEPT, JSON_DAMAGES),
    in_file(WEIGHTS, TENSOR_DAMAGES, HEADER_DAMAGES),
    in_file("non_lora_trainables.safetensors", TENSOR_DAMAGES, HEADER_DAMAGES),
    in_file(NON_LORA_TRAINABLES, TENSOR_DAMAGES, PICKLE_DAMAGES),
)


def test_adapters(stage, capsys, record_property):
    counts = Counts("adapters")

    @cases(0.5)
    @given(
        st.sampled_from(["mixlora", "words", "lora"]),
        st.lists(ADAPTER_DAMAGES, min_size=1, max_size=2, unique_by=lambda each: each[0]),
        st.booleans(),
    )
    def each(kind, damages, only_pickled):
        with copy_of(stage, kind) as (folder, marker):
            if only_pickled and not any(name.startswith("non_lora_trainables.s") for name, _ in damages):
                (folder / "non_lora_trainables.safetensors").unlink()
            for which in damages:
                damage(folder, which, marker)
            touched = {name for name, _ in damages}
            counts.run((kind, damages, only_pickled), lambda: adapter_doors(stage, folder, kind, touched))

    each()
    told(counts, capsys, record_property)


def test_checkpoints(stage, capsys, record_property):
    counts = Counts("checkpoints")
    damages = st.one_of(
        ADAPTER_DAMAGES.filter(lambda each: each[0] not in (RECORD, KEPT)),
        in_file(STATE, JSON_DAMAGES),
        in_file("run.json", JSON_DAMAGES),
        in_file("checksums.sha256"),
        in_file("optimizer.pt", PICKLE_DAMAGES),
        in_file("scheduler.pt", PICKLE_DAMAGES),
        in_file("rng_state.pth", PICKLE_DAMAGES),
    )

    @cases(0.2)
    @given(damages, st.sampled_from(["sealed", "sealed again", "not sealed"]))
    def each(which, seal):
        with copy_of(stage, "run") as (output, marker):
            folder = output / "checkpoint-4"
            damage(folder, which, marker)
            if seal == "sealed again" and which[1][0] not in ("pipe", "link", "folder"):
                checkpoint._seal(folder)
            elif seal == "not sealed":  # as LLaVA alone leaves it
                for name in ("checksums.sha256", "run.json"):
                    if (folder / name).is_file() or (folder / name).is_symlink():
                        (folder / name).unlink()
            counts.run((which, seal), lambda: checkpoint_doors(stage, output))

    each()
    told(counts, capsys, record_property)


@pytest.mark.parametrize("kind", ["questions", "answers", "data"])
def test_texts(stage, capsys, record_property, kind):
    counts = Counts(kind)
    names = [file.name for file in (stage.place / kind).iterdir() if file.suffix.startswith(".json")]
    damages = st.one_of(*(in_file(name, JSON_DAMAGES) for name in sorted(names)))

    @cases(0.1)
    @given(damages)
    def each(which):
        with copy_of(stage, kind) as (folder, marker):
            damage(folder, which, marker)
            doors = {"questions": question_doors, "answers": answer_doors, "data": data_doors}[kind]
            counts.run(which, lambda: doors(folder / which[0]))

    each()
    told(counts, capsys, record_property)
