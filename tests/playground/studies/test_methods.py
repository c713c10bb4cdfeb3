"""`playground.studies.methods`: every method learns, and is told of the tasks no more than its description says."""

import peft
import pytest
import torch

from llava_mixlora import MixLoraConfig
from playground.studies import methods
from playground.studies.methods import METHODS, ONE_PER_TASK, RANK, Course
from playground.studies.short_training import Items, TinyLlava, accuracy, right

from ...tiny import draw_pictures

TASKS = ("color", "shape", "both")
STEPS = [[0, 1, 2, 3, 4, 5]] * 2
LAYERS = (1,)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llava(llava_folder, tmp_path_factory):
    images = tmp_path_factory.mktemp("pictures")
    draw_pictures(images, 6)
    return TinyLlava(llava_folder, images)


@pytest.fixture(scope="module")
def items(llava):
    return Items(llava, [sample(number) for number in range(6)])


def sample(number):
    turns = [("human", f"<image>\nwhat {'color ' * (number % 3)}is the shape?"), ("gpt", ["red", "circle"][number % 2])]
    conversation = [{"from": speaker, "value": value} for speaker, value in turns]
    return {"id": str(number), "task": TASKS[number % 3], "image": f"{number}.png", "conversations": conversation}


def course(llava, items, steps=STEPS, rate=1e-2, **options):
    return Course(llava, items, steps, rate, 0, LAYERS, **options)


def logits(learner, items, tasks=None):
    model, batch = learner.model.eval(), items.batch(range(6))
    with torch.no_grad():
        return model(**learner.inputs(model, batch, items.tasks_of(range(6)) if tasks is None else tasks)).logits


def skip_without_arrow(name):
    if name.startswith("Arrow") and not hasattr(peft, "ArrowConfig"):
        pytest.skip("this PEFT has no Arrow")


@pytest.mark.parametrize("name", METHODS)
def test_method_learns_in_the_chosen_layers_and_can_be_asked(llava, items, name):
    skip_without_arrow(name)
    seen = []
    learnt = METHODS[name].learn(course(llava, items, watch=lambda learner, step: seen.append(step)))
    learner = learnt.learner
    assert not torch.equal(logits(learner, items), logits(methods.Learner(llava.fresh()), items))
    assert set(accuracy(learner.model, items, learner.inputs)) == set(TASKS)
    assert learnt.trained_parameters > 0
    kinds = ("mixlora_", "lora_A", "lora_B", "poly_")
    adapted = [name for name, _ in learner.model.named_parameters() if any(kind in name for kind in kinds)]
    assert adapted and all(".layers.1." in name for name in adapted)
    assert METHODS[name].name == name and METHODS[name].r == int(name.rpartition("=")[2])
    assert seen == {"Arrow, r=4": [], "X-LoRA, r=4": [1]}.get(name, [1, 2])


@pytest.mark.parametrize("name", METHODS)
def test_what_is_asked_depends_on_its_task_only_where_the_method_says_so(llava, items, name):
    skip_without_arrow(name)
    learner = METHODS[name].learn(course(llava, items, STEPS * 3)).learner
    other = (items.tasks_of(range(6)) + 1) % len(TASKS)
    differs = not torch.equal(logits(learner, items), logits(learner, items, other))
    assert differs == METHODS[name].asks_with_tasks


def test_forms_of_mixlora_are_those_of_the_issue():
    forms = {
        "paper": ("rank", "ifs_cfs", "prompt", "hidden"),
        "instruction": ("same", "ifs", "instruction", "hidden"),
        "words": ("same", "ifs", "instruction", "words"),
    }
    for name, wanted in forms.items():
        form = {"paper": methods.PAPER, "instruction": methods.INSTRUCTION, "words": methods.IN_WORDS}[name]
        config = MixLoraConfig(r=RANK, num_factors=methods.FACTORS, **form)
        assert (config.pairing, config.routing, config.router_scope, config.router_input) == wanted
        assert config.router_gradient == "straight_through"


def test_task_labels_are_told_in_training_alone(llava, items):
    learner = METHODS["MixLoRA words, task labels, r=4"].learn(course(llava, items)).learner
    tasks = torch.tensor([0, 1])
    assert torch.equal(learner.inputs(learner.model.train(), {}, tasks)["mixlora_tasks"], tasks)
    assert learner.inputs(learner.model.eval(), {}, tasks) == {}
    (config,) = learner.model.peft_config.values()
    assert config.tasks == list(TASKS) and config.task_loss_weight > 0


def test_one_lora_per_task_is_what_loras_trained_apart_are(llava, items):
    """Each of them sees its own task's gradients alone, so training without the other tasks gives the same update."""
    together = ONE_PER_TASK.learn(course(llava, items, [[0, 1]] * 3)).learner
    alone = ONE_PER_TASK.learn(course(llava, items, [[0]] * 3)).learner
    first = slice(0, RANK)
    compared = 0
    for (name, one), other in zip(together.model.named_parameters(), alone.model.parameters()):
        if "lora_B" in name:
            assert torch.equal(one[:, first].sign(), other[:, first].sign())
            assert not other[:, RANK:].any() and one[:, RANK : 2 * RANK].any() and not one[:, 2 * RANK :].any()
            compared += 1
    assert compared == 7


def test_saved_experts_are_the_loras_that_were_trained_together(llava, items):
    with methods._saved_experts(course(llava, items)) as (folders, parameters):
        experts = [peft.PeftModel.from_pretrained(llava.fresh(), folder) for folder in folders]
    together = ONE_PER_TASK.learn(course(llava, items))
    assert parameters == together.trained_parameters and len(experts) == len(TASKS)
    wanted = logits(together.learner, items)
    for number, task in enumerate(items.tasks):
        mine = [n for n, sample in enumerate(items.samples) if sample["task"] == task]
        found = logits(methods.Learner(experts[number]), items)[mine]
        assert torch.allclose(found, wanted[mine], atol=1e-5)


def test_oracle_uses_the_factors_that_task_labels_would_give(llava, items):
    learner = METHODS["oracle routes, r=4"].learn(course(llava, items)).learner
    subsets = methods.task_subsets(len(TASKS), methods.FACTORS, RANK)
    allowed = learner.inputs._allowed
    assert allowed.shape == (len(TASKS), methods.FACTORS) and allowed.sum(dim=1).tolist() == [RANK] * len(TASKS)
    assert all(allowed[task, subset].all() for task, subset in enumerate(subsets))
    unused = ~allowed.any(dim=0)
    learnt = [parameter for name, parameter in learner.model.named_parameters() if "lora_B" in name]
    assert all(parameter[:, ~unused].any() and not parameter[:, unused].any() for parameter in learnt)


def test_right_answers_of_a_method_that_is_told_the_tasks_are_found_with_them(llava, items):
    learner = ONE_PER_TASK.learn(course(llava, items, STEPS * 40, 2e-2)).learner
    assert any(right(learner.model, items, learner.inputs))
