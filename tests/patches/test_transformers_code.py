"""Code that a configuration names is not run, whatever is typed."""

import io
import json
import sys

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..tiny import message_of


@pytest.fixture
def hostile(patched, tmp_path):
    """A model that is made of its own code, which leaves a file where it runs."""
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(
        f"open({str(ran)!r}, 'w')\n"
        "from transformers import PretrainedConfig, PreTrainedModel\n"
        "class Config(PretrainedConfig):\n    model_type = 'hostile'\n"
        "class Model(PreTrainedModel):\n    config_class = Config\n"
    )
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hostile", "auto_map": names}))
    tokenizer = {"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return tmp_path


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
@pytest.mark.parametrize("kind", [AutoConfig, AutoModelForCausalLM, AutoTokenizer])
def test_code_of_a_model_is_never_run(hostile, monkeypatch, kind, trust):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    assert "auto_map" in message_of(kind.from_pretrained, str(hostile), **trust)
    assert not (hostile / "ran").exists() and sys.stdin.read() == "y\ny\ny\n"


def test_base_with_code_is_refused_by_upstreams_loader(hostile):
    from llava.model import builder

    assert "auto_map" in message_of(builder.load_pretrained_model, str(hostile), None, "some-mpt-model", device="cpu")
    assert not (hostile / "ran").exists()
