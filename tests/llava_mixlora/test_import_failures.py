"""What goes wrong in a LLaVA is told by its first cause, in small packages that fail as forks do."""

import importlib
import sys

import pytest

from llava_mixlora import MixLoraError, llava_package
from llava_mixlora.import_failures import first_cause, noted, told_in_one_line
from llava_mixlora.llava_package import LlavaPackage, llavas_beside, named_package, use
from llava_mixlora.llava_version import hidden_copies, of_copies, origin

pytestmark = pytest.mark.one_stack

HIDDEN = """
try:
    from .one import One
    from .two import Two
except:
    pass
"""
MODEL = "class Meta:\n    def prepare_inputs_labels_for_multimodal(self): ..."


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package whose files hold what is given, and uses it."""
    made, before = [], llava_package.used()

    def package(name="airy", folder=tmp_path, **files):
        made.append(name)
        for module, text in {"__init__": "", "model": MODEL, **files}.items():
            place = (folder / name).joinpath(*module.split("__in__")).with_suffix(".py")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        use(LlavaPackage(name))
        return llava_package.used()

    monkeypatch.syspath_prepend(tmp_path)
    yield package
    use(before)
    for name in [each for each in sys.modules if each.partition(".")[0] in made]:
        del sys.modules[name]
    importlib.invalidate_caches()


def message_of_import(module):
    with noted(llava_package.used()), pytest.raises(MixLoraError) as caught, told_in_one_line():
        importlib.import_module(module)
    return str(caught.value)


def test_cause_that_a_package_hides_is_told_for_the_name_that_is_then_missing(package, tmp_path):
    package(
        hidden__in__one="import rare_wheel\nclass One: ...",
        hidden__in__two="class Two: ...",
        hidden__in____init__=HIDDEN,
    )
    (tmp_path / "airy" / "train.py").write_text("from .hidden import One")
    wanted = (
        f"No module named 'rare_wheel' ({tmp_path}/airy/hidden/one.py, line 1); install what airy imports as rare_wheel"
    )
    assert wanted in message_of_import("airy.train")


def test_name_behind_the_failure_in_the_same_try_has_the_same_cause(package, tmp_path):
    package(
        hidden__in__one="import rare_wheel\nclass One: ...",
        hidden__in__two="class Two: ...",
        hidden__in____init__=HIDDEN,
    )
    (tmp_path / "airy" / "train.py").write_text("from .hidden import Two")
    assert "No module named 'rare_wheel'" in message_of_import("airy.train")


def test_failure_that_has_nothing_to_do_with_the_missing_name_is_not_told_for_it(package, tmp_path):
    package(optional="import rare_wheel", other="class Other: ...")
    (tmp_path / "airy" / "__init__.py").write_text("try:\n    from . import optional\nexcept ImportError:\n    pass")
    (tmp_path / "airy" / "train.py").write_text("from .other import Another")
    message = message_of_import("airy.train")
    assert "cannot import name 'Another'" in message and "rare_wheel" not in message


def test_name_that_a_library_no_longer_has_is_told_with_the_library(package):
    package(train="from json.decoder import Gone")
    assert message_of_import("airy.train").endswith("line 1); airy was written for another version of json")


@pytest.mark.parametrize("kind", ["RuntimeError", "ModuleNotFoundError"])
def test_cause_that_an_import_on_demand_wraps_is_told_alone(package, kind):
    package(
        lazy="try:\n    from json.decoder import Gone\nexcept ImportError as error:\n"
        f"    raise {kind}('Failed to import lazy because of the following error (look up ...)') from error",
        train="from . import lazy",
    )
    message = message_of_import("airy.train")
    assert "cannot import name 'Gone'" in message and "Failed to import" not in message


def test_name_that_is_nowhere_ends_a_program_of_the_package_in_one_line(package):
    package(train="def train():\n    return math.pi")
    train = importlib.import_module("airy.train").train
    told = r"NameError: name 'math' .*airy/train.py, line 2\); .* mend that line"
    with pytest.raises(MixLoraError, match=told), told_in_one_line():
        train()


def test_loader_is_told_with_what_it_hides_first_and_its_own_words_last(package):
    body = "try:\n        {}[path]\n    except:\n        raise ValueError('no ' + path)"
    text = f"def load_pretrained_model(path):\n    {body}"
    package(builder=text)
    with pytest.raises(MixLoraError) as caught, told_in_one_line():
        importlib.import_module("airy.builder").load_pretrained_model("tower")
    message = str(caught.value)
    assert message.startswith("load_pretrained_model of airy has failed: KeyError: 'tower' (")
    assert message.endswith("airy/builder.py, line 3). Its own words for that: ValueError: no tower")


def test_errors_of_a_program_that_is_no_llava_keep_all_their_lines(package):
    package()
    with pytest.raises(NameError), told_in_one_line():
        no_such_name  # noqa: B018, F821


def test_words_of_a_library_are_not_replaced_by_what_it_has_caught_itself(package):
    package()
    try:
        try:
            {}["cache"]
        except KeyError:
            raise OSError("no such model")  # noqa: B904 - as libraries do
    except OSError as error:
        assert first_cause(error, llava_package.used()) == "OSError: no such model"


def test_origin_tells_version_and_commit_of_a_clone(package, tmp_path):
    package()
    assert origin("airy") == f"{tmp_path}/airy"
    (tmp_path / "pyproject.toml").write_text("[build]\nversion = '9'\n[project]\nname = \"airy\"\nversion = '1.2'\n")
    (tmp_path / ".git" / "refs" / "heads").mkdir(parents=True)
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (tmp_path / ".git" / "packed-refs").write_text(f"# pack-refs\n{'a' * 40} refs/heads/main\n")
    assert origin("airy") == f"{tmp_path}/airy (airy 1.2 by its pyproject.toml, commit aaaaaaa)"
    (tmp_path / ".git" / "refs" / "heads" / "main").write_text("b" * 40)
    assert origin("airy").endswith("commit bbbbbbb)")
    assert origin("airy_gone") == "airy_gone, which is not installed"


def test_package_that_hides_another_of_its_name_is_known(package, tmp_path, monkeypatch):
    package()
    assert hidden_copies("airy") == []
    package(folder=tmp_path / "second")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "second")])
    assert hidden_copies("airy") == [tmp_path / "second" / "airy"]
    assert of_copies("airy", hidden_copies("airy")).startswith(f"hides another airy, {tmp_path}/second/airy: ")


def test_package_is_named_by_itself_or_by_a_module_of_it(package):
    package()
    assert "airy" in llavas_beside()
    assert named_package("airy") == LlavaPackage("airy")
    assert named_package("airy.train.train") == LlavaPackage("airy", ("airy.train.train",))
    with pytest.raises(MixLoraError, match="--package json: .* is no LLaVA; expected one of .*airy"):
        named_package("json")
