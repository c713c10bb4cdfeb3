"""A base with another configuration, for loaders that take none."""

import json

import pytest

from llava_mixlora.adapters.linked_base import linked_base

pytestmark = pytest.mark.one_stack


@pytest.mark.parametrize("base, delays", [("llama_folder", True), ("llava_folder", False)])
def test_files_are_the_bases_and_its_tower_is_loaded_unless_the_base_holds_it(request, base, delays):
    folder = request.getfixturevalue(base)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with linked_base(folder, {"model_type": "earthy"}) as place:
        found = {file.name: file.read_bytes() for file in place.iterdir()}
        assert json.loads(found.pop("config.json")) == {"model_type": "earthy", "delay_load": delays}
    assert not place.exists()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert found == {name: content for name, content in before.items() if name != "config.json"}
