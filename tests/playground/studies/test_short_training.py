"""`playground.studies.short_training`: what one forward pass tells of an answer is what generating it tells."""

from collections import Counter

import pytest
import torch

from llava_mixlora import MixLoraConfig
from llava_mixlora.evaluation.answering import answer
from llava_mixlora.evaluation.questions import Question
from playground.studies.short_training import WITHOUT_SYSTEM, Items, TinyLlava, accuracy, drawn, right, train

from ...tiny import LINEAR_LAYERS, draw_pictures, randomise

ANSWERS = ["red", "green", "blue", "circle", "square", "red circle", "shape", "color"]
LEARNT = [0, 1, 2]


@pytest.fixture(scope="module")
def llava(llava_folder, tmp_path_factory):
    images = tmp_path_factory.mktemp("pictures")
    draw_pictures(images, len(ANSWERS))
    return TinyLlava(llava_folder, images)


@pytest.fixture(scope="module")
def items(llava):
    return Items(llava, [sample(number, text) for number, text in enumerate(ANSWERS)])


def sample(number, text):
    turns = [("human", f"<image>\n{'what ' * number}color is the shape?"), ("gpt", text)]
    conversation = [{"from": speaker, "value": value} for speaker, value in turns]
    task = "early" if number < 4 else "late"
    return {"id": str(number), "task": task, "image": f"{number}.png", "conversations": conversation}


def adapted(llava, **options):
    config = MixLoraConfig(r=2, num_factors=6, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM", **options)
    return llava.adapted(config, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("router_scope", ["prompt", "sequence"])
def test_right_is_what_greedy_decoding_answers_to_the_letter(llava, items, router_scope):
    model = adapted(llava, router_scope=router_scope)
    train(model, items, [LEARNT] * 100, 3e-3)
    found = right(model, items)
    model.get_model().vision_tower = llava.loaded[1].get_vision_tower()
    asked = [
        Question(
            s["id"],
            s["task"],
            s["conversations"][0]["value"].removeprefix("<image>\n"),
            llava.image_folder / s["image"],
        )
        for s in items.samples
    ]
    tokenizer, _, image_processor = llava.loaded
    answers = answer((tokenizer, model, image_processor), asked, WITHOUT_SYSTEM, 1, 16, progress=False)
    assert found == [text == truth for (_, (text,)), truth in zip(answers, ANSWERS)]
    assert True in found and False in found


def test_answers_take_no_part_in_the_routes_even_of_routers_that_were_trained_on_them(llava):
    model = randomise(adapted(llava, router_scope="sequence"))
    right(model, Items(llava, [sample(0, "red"), sample(0, "square circle blue green")]))
    for route in model.base_model.routes().values():
        assert torch.equal(route.index_A[0], route.index_A[1]) and torch.equal(route.index_B[0], route.index_B[1])


def test_accuracy_is_the_share_of_right_answers_of_each_task(llava, items):
    model = adapted(llava)
    train(model, items, [LEARNT] * 100, 3e-3)
    hits = right(model, items)
    assert accuracy(model, items) == {"early": 25.0 * sum(hits[:4]), "late": 25.0 * sum(hits[4:])}
    assert any(hits)


def test_only_the_adapter_learns_and_the_base_stays_fresh(llava, items):
    before = {name: tensor.clone() for name, tensor in llava.loaded[1].state_dict().items()}
    model = adapted(llava)
    train(model, items, [[0, 1], []], 1e-2)
    for name, tensor in llava.loaded[1].state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all("mixlora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    again = adapted(llava)
    assert not any(p.any() for name, p in again.named_parameters() if "mixlora_B" in name)


def test_a_step_without_samples_changes_nothing(llava, items):
    model = adapted(llava)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, items, [[], []], 1e-2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_each_epoch_takes_every_sample_once_in_an_order_of_its_own():
    steps = list(drawn(12, steps=6, batch_size=4, seed=3))
    first, second = sum(steps[:3], []), sum(steps[3:], [])
    assert Counter(first) == Counter(second) == Counter(range(12)) and first != second
    assert steps == list(drawn(12, 6, 4, 3)) != list(drawn(12, 6, 4, 4))
