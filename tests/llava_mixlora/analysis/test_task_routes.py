"""Routes by task, and the pictures that `llava-mixlora plot --data` draws of them."""

import json

import pytest
import torch

from llava_mixlora.analysis.task_routes import TaskRoutes, draw_task_routes, task_routes
from llava_mixlora.cli import main
from llava_mixlora.inference.samples import SampleSource

from ...tiny import write_adapter


@pytest.fixture(scope="module")
def adapter(patched, llava_folder, tmp_path_factory):
    return write_adapter(llava_folder, tmp_path_factory.mktemp("llava-mixlora"))


def words(adapter, data, *more):
    given = ["plot", adapter, "--data", data / "data.json", "--image-folder", data, "--version", "llava_v1", *more]
    return [str(word) for word in given]


def test_usage_and_similarity_are_counted_by_task():
    chosen = torch.zeros(4, 2, 3, dtype=torch.bool)
    chosen[:2, :, 0] = True  # both samples of task a: factor 0 of A and of B
    chosen[2, :, 0] = chosen[3, :, 1] = True  # task b: factor 0, then factor 1
    routes = TaskRoutes(["a", "b"], torch.tensor([0, 0, 1, 1]), {"layer": chosen}, ["pool A", "pool B"])
    assert routes.usage("layer")[:, 0].tolist() == [[1, 0, 0], [0.5, 0.5, 0]]
    similarity = routes.similarity()
    assert similarity.diagonal().tolist() == pytest.approx([1, 1])
    assert similarity[0, 1].item() == pytest.approx(0.5**0.5)
    assert routes.distances("layer")[0].tolist() == [0, 0, 0, 1]


def test_routes_are_those_of_the_prompts(adapter, data):
    given = SampleSource(str(data / "data.json"), str(data), samples=6, version="llava_v1", batch_size=4)
    routes = task_routes(adapter, None, given)
    assert routes.tasks == ["color", "shape"] and routes.labels.tolist() == [0] * 6 + [1] * 6
    assert len(routes.chosen) == 14 and len(routes.three_layers()) == 3
    for chosen in routes.chosen.values():
        assert chosen.shape == (12, 2, 6) and (chosen.sum(dim=-1) == 2).all()  # r = 2 of E = 6
    alone = task_routes(adapter, None, SampleSource(**{**vars(given), "batch_size": 1}))
    assert all(torch.equal(alone.chosen[layer], chosen) for layer, chosen in routes.chosen.items())


def test_one_choice_for_both_pools_is_told_once(patched, llava_folder, data, tmp_path):
    folder = write_adapter(
        llava_folder, tmp_path / "llava-mixlora", trained=False, pairing="same", router_scope="instruction"
    )
    given = SampleSource(str(data / "data.json"), str(data), samples=3, version="llava_v1", batch_size=4)
    routes = task_routes(folder, None, given)
    assert routes.pools == ["pools A and B alike"]
    assert all(chosen.shape == (6, 1, 6) and (chosen.sum(dim=-1) == 2).all() for chosen in routes.chosen.values())
    draw_task_routes(routes, tmp_path / "routes")
    found = json.loads((tmp_path / "routes" / "routes.json").read_text())
    assert found["pools"] == routes.pools and all(torch.tensor(u).shape == (2, 1, 6) for u in found["usage"].values())
    assert (tmp_path / "routes" / "task_usage.png").read_bytes().startswith(b"\x89PNG")


def test_plot_draws_three_pictures_of_the_tasks(adapter, data, tmp_path):
    assert main(words(adapter, data, "--samples", 5, "--output", tmp_path / "routes")) == 0
    for name in ("task_usage", "route_map", "task_similarity"):
        assert (tmp_path / "routes" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "routes" / "routes.json").read_text())
    assert found["tasks"] == ["color", "shape"] and len(found["usage"]) == 14
    assert found["similarity"][0][0] == pytest.approx(1)


def test_tasks_with_dollar_signs_are_no_formulas(tmp_path):
    chosen, labels = {"layer": torch.eye(4, 6, dtype=torch.bool).unsqueeze(1)}, torch.tensor([0, 0, 1, 1])
    draw_task_routes(TaskRoutes(["a $x_{", "b $y_{$"], labels, chosen, ["pool A"]), tmp_path)
    assert (tmp_path / "task_usage.png").is_file() and (tmp_path / "task_similarity.png").is_file()


def test_model_without_routers_is_refused(llava_folder, data, tmp_path, capsys):
    assert main(words(llava_folder, data, "--samples", 2, "--output", tmp_path)) == 1
    assert "is no MixLoRA adapter" in capsys.readouterr().err
