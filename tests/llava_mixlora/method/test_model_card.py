"""`save_pretrained` leaves a card that tells what an adapter is and how to load it."""

import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model

from llava_mixlora import MixLoraConfig
from llava_mixlora.method.model_card import OURS, TrainingRecord, add_results

from ...tiny import random_ids, randomise


@pytest.fixture
def model(llama):
    return get_peft_model(llama, MixLoraConfig(r=2, num_factors=6, task_type="CAUSAL_LM"))


def card_of(model, folder):
    model.save_pretrained(folder)
    return (folder / "README.md").read_text()


def rows_of(card, heading):
    section = card.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| ([^|]*) \| ([^|]*) \|$", section, flags=re.M))


def test_card_tells_settings_parameters_and_versions(model, tmp_path):
    card = card_of(model, tmp_path / "out")
    assert "[More Information Needed]" not in card and "# out: a MixLoRA adapter" in card
    assert rows_of(card, "Method and settings")["num_factors"] == "6"
    trained = sum(p.numel() for name, p in model.named_parameters() if "mixlora_" in name)
    assert rows_of(card, "Parameters")["total"] == f"{trained:,}"
    assert rows_of(card, "Versions")["torch"] == torch.__version__
    assert "Data and hyperparameters are not recorded." in card


def test_card_tells_the_options_that_an_adapter_has(llama, tmp_path):
    names = ["what|where", "shape"]
    options = {"pairing": "same", "router_input": "words", "router_scope": "instruction", "router_init": "zero"}
    adapted = get_peft_model(llama, MixLoraConfig(**options, task_loss_weight=0.1, tasks=names, task_type="CAUSAL_LM"))
    card = card_of(adapted, tmp_path)
    settings = rows_of(card.replace(r"what\|where", "what or where"), "Method and settings")
    assert settings.items() >= {**options, "task_loss_weight": "0.1", "routing": "ifs"}.items()
    assert settings["tasks"] == "['what or where', 'shape']" and "cfs_temperature" not in settings
    trained = sum(p.numel() for name, p in adapted.named_parameters() if "mixlora_" in name)
    assert rows_of(card, "Parameters")["total"] == f"{trained:,}"  # without the sums of words


def test_card_tells_how_cfs_scores_where_there_is_cfs(llama, tmp_path):
    options = {"cfs": "table", "cfs_temperature": 0.5}
    card = card_of(get_peft_model(llama, MixLoraConfig(**options, task_type="CAUSAL_LM")), tmp_path)
    settings = rows_of(card, "Method and settings")
    assert settings.items() >= {"cfs": "table", "cfs_temperature": "0.5", "cfs_product": "inner"}.items()
    assert "tasks" not in settings


def test_card_is_one_that_the_hub_reads(model, tmp_path):
    card_of(model, tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "peft" and "mixlora" in data.tags


@pytest.mark.slow
def test_lines_of_the_card_load_the_adapter_to_the_bit(model, llama_folder, tmp_path):
    from transformers import LlamaForCausalLM

    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(llama_folder), MixLoraConfig(r=2, num_factors=6))
    randomise(adapted)
    card = card_of(adapted.eval(), tmp_path / "out")
    (script,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    # The card names a base from elsewhere by the end of its path, and the adapter by its folder.
    script = script.replace(f'"{llama_folder.name}"', repr(str(llama_folder)))
    ids = random_ids(2, 9)
    torch.save(ids, tmp_path / "ids.pt")
    script += "import torch\nids = torch.load('ids.pt')\ntorch.save(model(ids).logits.detach(), 'logits.pt')\n"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), adapted(ids).logits)


def test_base_on_this_machine_is_named_without_its_path(llama_folder, tmp_path):
    from transformers import LlamaForCausalLM

    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(llama_folder), MixLoraConfig(r=2, num_factors=6))
    card = card_of(adapted, tmp_path)
    assert f"`{llama_folder.name}`" in card and str(llama_folder) not in card


def test_base_from_the_hub_is_named_as_the_hub_knows_it(model, tmp_path):
    model.peft_config["default"].base_model_name_or_path = "owner/name"
    card = card_of(model, tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "owner/name"
    assert 'from_pretrained("owner/name")' in card


def test_what_is_recorded_of_the_training_is_told(model, tmp_path):
    record = TrainingRecord("train.json", 24_000, "ab" * 32, {"learning_rate": 2e-3}, loading="Ask the authors.")
    model.peft_config["default"].training_record = record
    card = card_of(model, tmp_path)
    assert rows_of(card, "Training")["sha256 of the data"] == "ab" * 32
    assert rows_of(card, "Training")["learning_rate"] == "0.002"
    assert "## Load it\n\nAsk the authors.\n" in card
    assert "training_record" not in (tmp_path / "adapter_config.json").read_text()


def test_card_is_written_anew_at_every_save_and_results_go_with_the_old_one(model, tmp_path):
    card_of(model, tmp_path)
    add_results(tmp_path, "| mean | 1% |")
    add_results(tmp_path, "| mean | 2% |")
    with_results = (tmp_path / "README.md").read_text()
    assert "## Results\n\n| mean | 2% |\n\n## Training\n" in with_results and "1%" not in with_results
    assert with_results.count("## Results") == 1
    model.peft_config["default"].decode_routing = "step"
    card = card_of(model, tmp_path)
    assert "| decode_routing | step |" in card and "## Results" not in card
    assert card.count("## Versions") == 1


@pytest.mark.parametrize("text", ["# Mine\n\nWords of mine.\n", "from the template"])
def test_words_that_somebody_wrote_stay(model, tmp_path, text):
    if text == "from the template":
        from huggingface_hub import ModelCardData

        text = ModelCard.from_template(ModelCardData()).text.replace("[More Information Needed]", "Words of mine.", 1)
    (tmp_path / "README.md").write_text(f"---\ntags: []\n---\n{text}")
    card = card_of(model, tmp_path)
    assert "Words of mine." in card and OURS not in card
    add_results(tmp_path, "| mean | 1% |")
    assert "1%" not in (tmp_path / "README.md").read_text()


def test_configuration_alone_has_no_card(tmp_path):
    MixLoraConfig().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]
    add_results(tmp_path, "| mean | 1% |")
    assert not (tmp_path / "README.md").exists()


def test_each_of_several_adapters_has_a_card(model, tmp_path):
    model.add_adapter("second", MixLoraConfig(r=1, num_factors=3))
    model.save_pretrained(tmp_path)
    assert rows_of((tmp_path / "second" / "README.md").read_text(), "Method and settings")["num_factors"] == "3"
    assert isinstance(PeftModel.from_pretrained(model.unload(), tmp_path / "second"), PeftModel)
