"""Pictures of the size that a tower's positions cover, which a fork may have stretched."""

import pytest
import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from llava_mixlora.data.picture_size import side_taken, take_size_of

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def tower(of_class_token=1, positions=None):
    """A tower of pictures of 8 x 8 pixels, with so many positions in the place of its own."""
    config, model = (CLIPVisionConfig, CLIPVisionModel) if of_class_token else (SiglipVisionConfig, SiglipVisionModel)
    made = model(config(image_size=8, patch_size=4, **SMALL))
    if positions is not None:
        holder = next(module for module in made.modules() if hasattr(module, "position_embedding"))
        holder.position_embedding = nn.Embedding(positions, 8)
    return made


@pytest.mark.parametrize("of_class_token", [1, 0])
def test_side_is_told_where_positions_are_of_another_size_than_the_configuration(of_class_token):
    assert side_taken(tower(of_class_token)) is None
    assert side_taken(tower(of_class_token, 9 + of_class_token)) == 12
    assert side_taken(nn.Linear(2, 2)) is None


def test_pictures_are_made_of_the_size_of_stretched_positions_alone():
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    before = dict(vars(processor))
    for unchanged in (tower(), None):
        take_size_of(unchanged, processor)
        assert vars(processor) == before
    take_size_of(tower(positions=10), processor)
    picture = torch.zeros(3, 20, 30)
    assert processor(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, 12, 12)
    take_size_of(tower(positions=10), None)
