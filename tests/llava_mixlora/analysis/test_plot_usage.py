"""The picture that `llava-mixlora plot` draws."""

import sys

import pytest
from matplotlib.figure import Figure
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_mixlora.analysis.plot_usage import plot
from llava_mixlora.cli import main

from ...tiny import paper_form, random_ids


@pytest.fixture
def write(llama, tmp_path):
    """Writes an adapter that was trained."""

    def write(**options):
        model = get_peft_model(llama, paper_form(r=2, num_factors=6, task_type="CAUSAL_LM", **options)).train()
        model(input_ids=random_ids(3, 5))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return write


@pytest.fixture
def adapter(write):
    return write()


def test_picture_is_drawn(adapter, tmp_path, capsys):
    assert main(["plot", str(adapter)]) == 0
    assert str(adapter / "usage.png") in capsys.readouterr().out
    assert main(["plot", str(adapter), "--output", str(tmp_path / "new" / "other.png")]) == 0
    for file in (adapter / "usage.png", tmp_path / "new" / "other.png"):
        with Image.open(file) as picture:
            assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.parametrize(("pairing", "panels"), [("rank", ["pool A", "pool B"]), ("same", ["pools A and B alike"])])
def test_a_panel_is_drawn_for_each_choice_of_factors(write, pairing, panels, tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig

    def look_and_save(figure, *arguments, **options):
        drawn.extend(figure.axes)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", look_and_save)
    plot(write(pairing=pairing), tmp_path / "usage.png")
    assert [axis.get_title() for axis in drawn if axis.images] == panels
    assert all(axis.images[0].get_array().shape == (14, 6) for axis in drawn if axis.images)


def test_adapter_without_statistics_is_refused(llama, tmp_path, capsys):
    get_peft_model(llama, paper_form(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert main(["plot", str(tmp_path)]) == 1
    assert "holds no routing statistics" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("name", ["adapter/adapter_config.json/usage.png", "usage.nonsense"])
def test_output_that_cannot_be_written_is_named(adapter, tmp_path, name, capsys):
    assert main(["plot", str(adapter), "--output", str(tmp_path / name)]) == 1
    assert f"--output {tmp_path / name} cannot be written" in capsys.readouterr().err.splitlines()[-1]


def test_missing_matplotlib_is_one_line(adapter, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # what Python notes of a module that is not there
    assert main(["plot", str(adapter)]) == 1
    assert "plot needs matplotlib; pip install 'llava-mixlora[eval]'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["usage.png", ".unfinished-usage.png"])
def test_nothing_is_drawn_through_a_link_in_the_adapters_folder(adapter, tmp_path, capsys, name):
    (tmp_path / "precious").write_text("precious")
    (adapter / name).symlink_to(tmp_path / "precious")
    status = main(["plot", str(adapter)])
    assert (tmp_path / "precious").read_text() == "precious"
    assert (status, "is a link" in capsys.readouterr().err) == ((1, True) if name == "usage.png" else (0, False))


def test_routes_are_not_written_into_a_linked_folder(adapter, data, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (adapter / "routes").symlink_to(tmp_path / "elsewhere")
    assert main(["plot", str(adapter), "--data", str(data / "data.json"), "--image-folder", str(data)]) == 1
    assert "routes is a link" in capsys.readouterr().err and not any((tmp_path / "elsewhere").iterdir())


def test_incomplete_adapter_is_drawn_where_that_is_asked_for(adapter, capsys):
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.mixlora_A"]
    save_file(tensors, weights)
    assert main(["plot", str(adapter)]) == 1
    assert "q_proj.mixlora_A (1 of " in capsys.readouterr().err
    assert main(["plot", str(adapter), "--allow-incomplete"]) == 0


def test_name_with_dollar_signs_is_no_formula(adapter, tmp_path):
    named = adapter.rename(tmp_path / "$a_{$b")
    plot(named, tmp_path / "usage.png")
    assert (tmp_path / "usage.png").stat().st_size > 0
