"""Task labels on their way from the data to the model, through a real Trainer."""

import multiprocessing
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding, Trainer, TrainingArguments, default_data_collator

import llava_mixlora
from llava_mixlora import MixLoraError
from llava_mixlora.training.task_labels import TaskLabels, task_names

from ...tiny import message_of

TASKS = ["chart", "ocr", "vqa"]


class Recorder(nn.Module):
    """A model that keeps what it is called with, and takes what `forward` does not name as a hook would."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.numbers, self.tasks = [], []
        self.register_forward_pre_hook(self.note, with_kwargs=True)

    @staticmethod
    def note(self, args, kwargs):
        self.tasks.append(kwargs.pop("mixlora_tasks", None))
        return args, kwargs

    def forward(self, number=None, labels=None):
        self.numbers.append(number)
        return {"loss": (self.weight - labels.float()).square().mean(), "logits": number.float()[:, None]}


def rows(count=8):
    return [{"number": n, "labels": 1.0, "task": TASKS[n % 3]} for n in range(count)]


@pytest.fixture
def trainer(tmp_path):
    def build(data, collator=None, **options):
        options = {
            "report_to": "none",
            "save_strategy": "no",
            "max_steps": 4,
            "remove_unused_columns": False,
            **options,
        }
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, per_device_train_batch_size=2, disable_tqdm=True, **options
        )
        collator = TaskLabels(default_data_collator, TASKS) if collator is None else collator
        return Trainer(Recorder(), arguments, train_dataset=data, eval_dataset=data, data_collator=collator)

    return build


def assert_each_row_has_its_task(model, data):
    assert model.tasks and all(tasks.dtype == torch.int64 for tasks in model.tasks)
    seen = torch.cat(model.numbers).tolist()
    assert len(set(seen)) == len(data)
    assert torch.cat(model.tasks).tolist() == [TASKS.index(data[number]["task"]) for number in seen]


@pytest.mark.parametrize("workers", [0, 2])
def test_model_gets_the_task_of_every_instance(trainer, workers):
    built = trainer(rows(), dataloader_num_workers=workers)
    built.train()
    assert_each_row_has_its_task(built.model, rows())


def test_dataset_of_the_hub_works_too(trainer):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows())
    assert task_names(data) == task_names(data.select_columns("task")) == TASKS
    built = trainer(data)
    built.train()
    assert_each_row_has_its_task(built.model, rows())


def test_evaluation_gets_a_loss(trainer):
    built = trainer(rows())
    assert built.evaluate()["eval_loss"] == 1.0
    assert_each_row_has_its_task(built.model, rows())


@pytest.mark.parametrize("kind", ["list", "datasets.Dataset"])
def test_columns_that_the_trainer_removes_are_told_of_in_one_line(trainer, kind):
    data = rows() if kind == "list" else pytest.importorskip("datasets").Dataset.from_list(rows())
    built = trainer(data, remove_unused_columns=True)
    assert "TrainingArguments(remove_unused_columns=False)" in message_of(built.train)
    assert not built.model.numbers


def test_wrapped_collator_gets_everything_else_and_samples_stay_whole():
    given = []
    samples = [{"id": 7, "number": 1, "task": "vqa"}, {"number": 2, "task": "chart"}]
    batch = TaskLabels(lambda rest: given.extend(rest) or {"count": len(rest)}, TASKS)(samples)
    assert given == [{"id": 7, "number": 1}, {"number": 2}]
    assert batch.keys() == {"count", "mixlora_tasks"} and batch["mixlora_tasks"].tolist() == [2, 0]
    assert samples[0]["task"] == "vqa"


def test_batch_keeps_its_type():
    batch = TaskLabels(lambda rest: BatchEncoding({"count": len(rest)}), TASKS)([{"task": "ocr"}])
    assert isinstance(batch, BatchEncoding) and batch["mixlora_tasks"].tolist() == [1]


def test_order_of_the_tasks_is_that_which_is_given():
    collator = TaskLabels(default_data_collator, ["vqa", "ocr"])
    assert collator([{"task": "ocr"}, {"task": "vqa"}])["mixlora_tasks"].tolist() == [1, 0]


@pytest.mark.parametrize(
    "sample, named",
    [
        ({"number": 1}, "sample 1 of a batch has no field 'task'"),
        ({"number": 1, "id": "gqa-17"}, "sample 'gqa-17' has no field 'task'"),
        ({"number": 1, "id": 17, "task": None}, "sample 17 has a 'task' of type NoneType"),
        ({"number": 1, "task": 3}, "sample 1 of a batch has a 'task' of type int"),
        ({"number": 1, "task": torch.zeros(2, 2)}, "a 'task' of type Tensor"),
        ({"number": 1, "task": " "}, "sample 1 of a batch has an empty 'task'"),
        ([1, 2], "of type list"),
    ],
)
def test_sample_without_a_task_is_named(sample, named):
    collator = TaskLabels(default_data_collator, TASKS)
    message = message_of(collator, [{"number": 0, "task": "vqa"}, sample])
    assert named in message and "remove_unused_columns=False" in message


def test_unknown_task_is_named_with_those_that_are_known():
    collator = TaskLabels(default_data_collator, TASKS)
    message = message_of(collator, [{"task": "vqa"}, {"id": "a1", "task": "VQA"}])
    assert "sample 'a1' has task='VQA'; expected one of 'chart', 'ocr', 'vqa';" in message


def test_many_known_tasks_are_shortened():
    collator = TaskLabels(default_data_collator, [f"task {n}" for n in range(300)])
    message = message_of(collator, [{"task": "vqa"}])
    assert "'task 9', ... (300 in all)" in message and len(message) < 400


@pytest.mark.parametrize("tasks", [None, [], "vqa", ["vqa", "ocr", "vqa"], [1, 2], {"vqa": 0}])
def test_what_names_no_tasks_is_refused(tasks):
    assert f"tasks={tasks!r}" in message_of(TaskLabels, default_data_collator, tasks)


def test_collator_can_be_pickled():
    collator = pickle.loads(pickle.dumps(TaskLabels(default_data_collator, TASKS)))
    batch = collator([{"number": 5, "task": "ocr"}])
    assert batch["number"].tolist() == [5] and batch["mixlora_tasks"].tolist() == [1]


@pytest.mark.slow
def test_workers_may_be_new_processes():
    loader = DataLoader(
        rows(),
        batch_size=4,
        collate_fn=TaskLabels(default_data_collator, TASKS),
        num_workers=1,
        multiprocessing_context=multiprocessing.get_context("spawn"),
    )
    assert [batch["mixlora_tasks"].tolist() for batch in loader] == [[0, 1, 2, 0], [1, 2, 0, 1]]


def test_attributes_are_those_of_the_wrapped_collator():
    class Collator:
        tokenizer = "a tokenizer"

    collator = TaskLabels(Collator(), TASKS)
    assert collator.tokenizer == "a tokenizer" and not hasattr(collator, "padding_free")


def test_package_has_it_by_name():
    assert llava_mixlora.TaskLabels is TaskLabels and "TaskLabels" in llava_mixlora.__all__


def test_tasks_of_data_are_its_different_names_sorted():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    data = [{"id": str(n), "conversations": turns, "task": task} for n, task in enumerate(["vqa", "ocr", "vqa"])]
    assert task_names(data) == task_names(iter(data)) == ["ocr", "vqa"]


def test_data_with_a_missing_label_is_named():
    data = [{"task": "vqa"}, {"id": "x-1"}, {}]
    expected = "train.json: sample 'x-1' has no field 'task', which task_loss_weight needs"
    assert message_of(task_names, data, "train.json").startswith(expected)
    assert "the data: sample 1 has no field" in message_of(task_names, [{"task": "vqa"}, {}])
    assert "no samples" in message_of(task_names, [])


def test_error_is_a_value_error_for_programs():
    with pytest.raises(MixLoraError):
        task_names([{}])
