"""`playground.studies.short_training`: what one forward pass tells of an answer is what generating it tells."""

from collections import Counter

import pytest
import torch

from llava_mixlora.evaluation.answering import answer
from llava_mixlora.evaluation.questions import Question
from playground.studies.short_training import WITHOUT_SYSTEM, Items, TinyLlava, accuracy, drawn, right, train

from ...tiny import LINEAR_LAYERS, draw_pictures, paper_form, randomise

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
    config = paper_form(r=2, num_factors=6, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM", **options)
    return llava.adapted(config, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("router_scope", ["prompt", "sequence"])
def test_right_is_what_greedy_decoding_answers_to_the_letter(llava, items, router_scope):
    model = adapted(llava, router_scope=router_scope)
    train(model, items, [LEARNT] * 100, 3e-3)
    found = right(model, items)
    model.get_model().vision_tower = llava.loaded[1].get_vision_tower()
    model.get_model().mm_projector = llava.loaded[1].get_model().mm_projector
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
    train(model, items, [[0, 1]], 1e-2)
    for name, tensor in llava.loaded[1].state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all("mixlora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    again = adapted(llava)
    assert not any(p.any() for name, p in again.named_parameters() if "mixlora_B" in name)


def test_a_picture_is_looked_at_once_and_a_text_is_read_once(llava, monkeypatch):
    samples = [{**sample(1, "red"), "image": image} for image in ("5.png", "6.png", "5.png")]
    items = Items(llava, samples)
    first = items.batch([0, 1, 2])
    monkeypatch.setattr(items, "_dataset", None)
    again = items.batch([1, 2])
    assert all(torch.equal(first[name][1:], again[name]) for name in first)
    assert torch.equal(first["images"][0], first["images"][2]) and not torch.equal(*first["images"][:2])


def test_tasks_are_numbered_as_asked_and_unknown_ones_by_minus_one(llava):
    samples = [sample(0, "red"), sample(5, "blue")]
    assert Items(llava, samples).tasks_of([0, 1, 0]).tolist() == [0, 1, 0]
    assert Items(llava, samples, ["late", "other"]).tasks_of([0, 1]).tolist() == [-1, 0]


def test_inputs_see_the_task_of_every_instance_in_training_and_when_asked(llava, items):
    seen = []

    def inputs(model, batch, tasks):
        seen.append((model.training, tasks.tolist()))
        return batch

    model, watched = adapted(llava), []
    train(model, items, [[0, 4], [5, 1]], 1e-3, inputs, watched.append)
    assert seen == [(True, [0, 1]), (True, [1, 0])] and watched == [1, 2]
    right(model, items, inputs)
    assert seen[2:] == [(False, [0] * 4 + [1] * 4)]


def test_asking_on_the_way_does_not_change_what_is_learnt(llava, items):
    plain, watched = adapted(llava, lora_dropout=0.0), adapted(llava, lora_dropout=0.0)
    steps = [LEARNT] * 3
    train(plain, items, steps, 1e-2)
    train(watched, items, steps, 1e-2, watch=lambda step: right(watched, items))
    wanted = dict(plain.named_parameters())
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in watched.named_parameters())


def test_each_epoch_takes_every_sample_once_in_an_order_of_its_own():
    steps = list(drawn(12, steps=6, batch_size=4, seed=3))
    first, second = sum(steps[:3], []), sum(steps[3:], [])
    assert Counter(first) == Counter(second) == Counter(range(12)) and first != second
    assert steps == list(drawn(12, 6, 4, 3)) != list(drawn(12, 6, 4, 4))
