"""The order of the data of adapter runs; what checkpoints hold is tested in tests/end_to_end/test_checkpoints.py."""

import pytest
import torch
from llava_mixlora.patches.llava_trainer_checkpoints import RepeatableOrder
from torch.utils.data import RandomSampler


@pytest.fixture(params=["random", "grouped"])
def sampler(request, patched):
    """The two samplers that LLaVATrainer chooses from."""
    from llava.train.llava_trainer import LengthGroupedSampler

    if request.param == "random":
        return RandomSampler(range(40))
    lengths = [(-1) ** number * (5 + number % 7) for number in range(40)]
    return LengthGroupedSampler(batch_size=2, world_size=2, lengths=lengths, group_by_modality=True)


def order(sampler, seed=0, epoch=0):
    return list(RepeatableOrder(sampler, seed, lambda: epoch))


def test_order_depends_on_seed_and_epoch_alone(sampler):
    first = order(sampler)
    torch.rand(7)
    assert order(sampler) == first
    assert order(sampler, epoch=1) != first
    assert order(sampler, seed=1) != first


def test_order_has_every_example_once(sampler):
    assert sorted(order(sampler)) == list(range(40))
    assert len(RepeatableOrder(sampler, 0, lambda: 0)) == 40


def test_drawing_an_order_leaves_the_global_generator_alone(sampler):
    before = torch.get_rng_state()
    order(sampler)
    assert torch.equal(torch.get_rng_state(), before)
