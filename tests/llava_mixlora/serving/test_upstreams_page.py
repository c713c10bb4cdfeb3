"""LLaVA's web page is refused where it could not answer."""

import sys

import pytest

from llava_mixlora.launch import run
from llava_mixlora.serving import upstreams_page

from ...tiny import message_of

PAGE = "llava.serve.gradio_web_server"


@pytest.fixture
def gradio(tmp_path, monkeypatch):
    """Makes a version of gradio look installed."""

    def gradio(version):
        (tmp_path / "gradio.py").write_text("")
        told = tmp_path / f"gradio-{version}.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: gradio\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)

    monkeypatch.setattr(sys, "argv", ["pytest"])
    return gradio


@pytest.mark.parametrize("version", ["6.0.0", "6.31.0"])
def test_page_is_refused_on_a_gradio_that_takes_no_pairs_and_ours_is_named(gradio, version):
    gradio(version)
    message = message_of(run, PAGE, ["--controller-url", "http://localhost:1"], as_module=True)
    assert f"on gradio {version}" in message and "`llava-mixlora serve ADAPTER`" in message


def test_page_without_gradio_names_ours(monkeypatch):
    def missing(name):
        raise upstreams_page.PackageNotFoundError(name)

    monkeypatch.setattr(upstreams_page, "version", missing)
    message = message_of(run, PAGE, [], as_module=True)
    assert "gradio is not installed here" in message and "`llava-mixlora serve ADAPTER`" in message


def test_older_gradio_is_left_to_the_page_and_other_programs_to_themselves(gradio):
    gradio("5.50.0")
    upstreams_page.check_gradio(PAGE)
    gradio("6.31.0")
    upstreams_page.check_gradio("llava.serve.cli")
