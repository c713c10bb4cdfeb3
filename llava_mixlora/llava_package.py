"""Which LLaVA is used, and where its parts are: found by what they are, whatever a fork calls them and itself.

Parts are named as LLaVA itself names them, `"llava.train.llava_trainer:LLaVATrainer.train"`; a fork has the like
of them elsewhere, or not at all. Files are read and none is imported: many forks cannot be before patches are in place.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from .errors import MixLoraError

ORIGINAL = "llava"
INSERTS_IMAGES = "prepare_inputs_labels_for_multimodal"
"""The method that every LLaVA has, and nothing else: a package with it is one."""

TRAIN, TRAINER, ARCH = "llava.train.train", "llava.train.llava_trainer", "llava.model.llava_arch"
TRAINER_CLASS, ARCH_CLASS = "LLaVATrainer", "LlavaMetaForCausalLM"
CLASSES_OF_ARCH = {ARCH_CLASS: INSERTS_IMAGES, "LlavaMetaModel": "initialize_vision_modules"}
"""Of the module that puts images in, each with the method by which the like of it is known."""
TRAINED_CLASS = "LlavaLlamaForCausalLM"
"""What train() loads its base as, in some forks one of several classes; they are names of its module."""
LANGUAGE_MODELS = "llava.model.language_model"
LEADING = {
    "llava.model.builder": "load_pretrained_model",
    "llava.mm_utils": "tokenizer_image_token",
    "llava.conversation": "conv_templates",
    "llava.constants": "IMAGE_TOKEN_INDEX",
}
"""What a module has to define to be the like of LLaVA's, if it has another name."""
DELAYED = "delay_load"
TRAINS = {"train", "TrainingArguments"}
DATA_SET = "LazySupervisedDataset"


@dataclass(frozen=True)
class Defined:
    """One name that a module defines, with the names of a class's bases and methods, or imports from a source."""

    module: str
    name: str
    bases: tuple[str, ...] = ()
    methods: frozenset[str] = frozenset()
    imported: bool = False
    source: str | None = None

    @property
    def place(self) -> str:
        """As `"module:name"`."""
        return f"{self.module}:{self.name}"


@dataclass(frozen=True)
class LlavaPackage:
    """A LLaVA: LLaVA itself, or a fork under whatever name.

    Args:
        name: of the package.
        runs: what is to be run, the modules of the package that this is or imports; empty where that is not known.
    """

    name: str
    runs: tuple[str, ...] = ()

    @functools.cached_property
    def folder(self) -> Path | None:
        """Where an import finds it; None where it is not installed."""
        return folder_of(self.name)

    def places(self, part: str) -> tuple[str, ...]:
        """Where it has the like of a part of LLaVA, as `"module:attribute"`; more than one place for language models.

        A part of no LLaVA, such as one of transformers, is where it says.

        Args:
            part: as LLaVA itself has it, `"llava.model.builder:load_pretrained_model"`.
        """
        module, _, attribute = part.partition(":")
        if module.partition(".")[0] != ORIGINAL:
            return (part,)
        head, _, rest = attribute.partition(".")
        tail = f".{rest}" if rest else ""
        return tuple(f"{found.place}{tail}" for found in self._the_like_of(module, head))

    def module(self, module: str) -> str | None:
        """Name of the module that is the like of LLaVA's `module`; None where there is none."""
        if module == TRAIN:
            return self._training_module
        if module in (TRAINER, ARCH):
            found = self.places(f"{module}:{TRAINER_CLASS if module == TRAINER else ARCH_CLASS}")
            return found[0].partition(":")[0] if found else None
        here = self.name + module.removeprefix(ORIGINAL)
        leading = LEADING.get(module)
        if leading is None:
            return here if here in self._modules else None
        having = [one.module for one in self._named(leading) if not one.imported]
        return here if here in having else min(having, key=_depth, default=None)

    def imports(self, module: str, name: str) -> bool:
        """Whether any of its modules imports that name from that module."""
        source = f"{module}:{name}"
        return any(one.source == source for defined in self._modules.values() for one in defined)

    def modules_with(self, name: str) -> list[str]:
        """Its modules that define a name themselves."""
        return [one.module for one in self._named(name) if not one.imported]

    @property
    def may_leave_towers_empty(self) -> bool:
        """Whether it makes the tower before it reads a checkpoint, unless the `config.json` there says `delay_load`."""
        module = self.module(ARCH)
        tree = ast.Module([], []) if module is None else _tree(file_of(module))
        return any(isinstance(node, ast.Constant) and node.value == DELAYED for node in ast.walk(tree))

    @functools.cached_property
    def takes_several_images(self) -> bool:
        """Whether its data set takes a list of images in a sample, which it then asks about."""
        module = next((one.module for one in self._named(DATA_SET) if not one.imported), None)
        tree = ast.Module([], []) if module is None else _tree(file_of(module))
        classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == DATA_SET)
        asked = (node for each in classes for node in ast.walk(each) if isinstance(node, (ast.Compare, ast.Call)))
        return any(isinstance(part, ast.Name) and part.id == "list" for node in asked for part in _operands(node))

    @property
    def trains(self) -> bool:
        """Whether what is to be run trains."""
        return any(module in self._training_modules for module in self.runs)

    @functools.cached_property
    def language_models(self) -> tuple[Defined, ...]:
        """Its language models with images in their sequence, in the order of their modules' names."""
        names = {one.name for one in self._inserting_images}
        return tuple(one for module in self._modules.values() for one in module if names & set(one.bases))

    def language_model(self, model_type: str | None) -> tuple[Defined, str] | None:
        """The language model of a `config.json` with that type, and the type that it itself writes there.

        A run that begins with a bare language model leaves its type there in some forks.
        """
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        bare = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        for of_it in (lambda model, own: own == model_type, lambda model, own: bare in model.bases):
            for model in self.language_models:
                if (own := _model_type(_tree(file_of(model.module)))) is not None and of_it(model, own):
                    return model, own
        return None

    @functools.cached_property
    def _modules(self) -> dict[str, tuple[Defined, ...]]:
        return {} if self.folder is None else _modules_of(self.name, self.folder)

    def _named(self, name: str) -> list[Defined]:
        return [one for module in self._modules.values() for one in module if one.name == name]

    def _the_like_of(self, module: str, head: str) -> list[Defined]:
        if module == ARCH and head in CLASSES_OF_ARCH:
            return self._inherited_with(CLASSES_OF_ARCH[head])
        if module.startswith(f"{LANGUAGE_MODELS}."):
            return list(self.language_models)
        if module == TRAINER and head == TRAINER_CLASS:
            return self._trainers
        here = self.module(module)
        if module == TRAIN and head == TRAINED_CLASS:
            text = "" if here is None else _text(file_of(here))
            return [Defined(here, one.name) for one in self.language_models if f"{one.name}.from_pretrained" in text]
        found = [one for one in self._modules.get(here, ()) if one.name == head]
        if module != TRAIN or here is None or any(not one.imported for one in found):
            return found[:1]
        # What it imports from a module of its own package is looked up there, as are the globals of the data set.
        own = [one for one in self._named(head) if not one.imported]
        return (own or [one for one in self._of_the_data_set if one.name == head] or found)[:1]

    @functools.cached_property
    def _of_the_data_set(self) -> tuple[Defined, ...]:
        module = next((one.module for one in self._named(DATA_SET) if not one.imported), None)
        return self._modules.get(module, ())

    @functools.cached_property
    def _training_modules(self) -> list[str]:
        own = {name: {one.name for one in module if not one.imported} for name, module in self._modules.items()}
        return [name for name, names in own.items() if names >= TRAINS]

    @functools.cached_property
    def _training_module(self) -> str | None:
        preferred = (*self.runs, self.name + TRAIN.removeprefix(ORIGINAL))
        found = next((name for name in preferred if name in self._training_modules), None)
        return found or min(self._training_modules, key=_depth, default=None)

    @functools.cached_property
    def _trainers(self) -> list[Defined]:
        training = self._modules.get(self._training_module, ())
        used = {one.name for one in training}
        known = [
            one for module in self._modules.values() for one in module if not one.imported and "Trainer" in one.bases
        ]
        return [one for one in known if one.name in used][:1] or ([] if used else known[:1])

    @functools.cached_property
    def _inserting_images(self) -> list[Defined]:
        return self._inherited_with(INSERTS_IMAGES)

    def _inherited_with(self, method: str) -> list[Defined]:
        having = [one for module in self._modules.values() for one in module if method in one.methods]
        inherited = {base for module in self._modules.values() for one in module for base in one.bases}
        return [one for one in having if one.name in inherited] or having[:1]


def used() -> LlavaPackage:
    """The LLaVA that this process uses: LLaVA itself, unless [`use`] has said otherwise."""
    return _used


def use(package: LlavaPackage) -> None:
    """From here on this process uses this LLaVA; patches that are in place stay where they are."""
    global _used
    _used = package


_used = LlavaPackage(ORIGINAL)


def part(name: str) -> Any:
    """A part of the LLaVA that is used, or, without a `:`, a module of it, imported.

    Args:
        name: as LLaVA itself has it, such as `"llava.conversation:conv_templates"`.

    Raises:
        MixLoraError: it has nothing of the kind.
    """
    if ":" not in name:
        module = _used.module(name)
        if module is not None:
            return importlib.import_module(module)
    places = _used.places(name) if ":" in name else ()
    if not places:
        raise MixLoraError(
            f"{_used.name}, in {_used.folder or 'no folder, for it is not installed'}, lacks the like of {name}, "
            "which this command needs"
        )
    module, _, attribute = places[0].partition(":")
    return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))


def package_of_program(path: Path, module: str | None = None) -> LlavaPackage:
    """The LLaVA that a program is of, or that it imports; LLaVA itself where it names none.

    Args:
        path: the program's file; an import of a script finds what lies beside it first.
        module: its name, where it is run as a module.

    Raises:
        MixLoraError: it imports two of them.
    """
    own = module or _name_by_folders(path)
    runs = (*([own] if own is not None else ()), *_imported_modules(path))
    with _looking_beside(None if module is not None else path):
        found = [name for name in dict.fromkeys(run.partition(".")[0] for run in runs) if is_llava(name)]
        folders = [f"{name} ({folder_of(name)})" for name in found]
    if own is not None and found[:1] == [own.partition(".")[0]]:
        found = found[:1]
    if len(found) > 1:
        raise MixLoraError(
            f"{path} imports two LLaVAs, {' and '.join(folders)}; expected one, which the plugin joins: take one "
            "import out"
        )
    package = found[0] if found else ORIGINAL
    return LlavaPackage(package, tuple(run for run in runs if run.partition(".")[0] == package))


@contextmanager
def _looking_beside(script: Path | None) -> Iterator[None]:
    before = list(sys.path)
    if script is not None:
        sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.path[:] = before


def is_llava(name: str) -> bool:
    """Whether an installed package is a LLaVA, by the method that puts image features into the sequence."""
    if name in sys.stdlib_module_names or (folder := folder_of(name)) is None:
        return False
    # Not in a tree of any size: a LLaVA has it in its `model` folder.
    files = [*folder.glob("*.py"), *folder.glob("model/*.py")]
    having = (file for file in files if f"def {INSERTS_IMAGES}(" in _text(file))
    return any(INSERTS_IMAGES in one.methods for file in having for one in _defined(name, _tree(file)))


def llavas_beside(installed: bool = False) -> list[str]:
    """Names of the LLaVAs in the folders that the user has put on Python's path, as the current one.

    Args:
        installed: look among all packages that pip has installed too, which takes longer.
    """
    names = [name for entry in sys.path if not _is_installed(entry) for name in _packages_in(Path(entry or "."))]
    if installed:
        names += [name for name in packages_distributions() if _may_be_llava(name)]
    return [name for name in dict.fromkeys(names) if name.isidentifier() and is_llava(name)]


def _may_be_llava(name: str) -> bool:
    """Whether an installed package has a LLaVA's folder, or lies elsewhere; finders of other packages are not asked."""
    places = [Path(entry) / name for entry in sys.path if _is_installed(entry)]
    if any(place.is_dir() for place in places):
        return any((place / "model").is_dir() for place in places)
    return not any(list(place.parent.glob(f"{name}.*")) for place in places)


def _is_installed(entry: str) -> bool:
    return bool({"site-packages", "dist-packages"} & set(Path(entry).parts)) or entry in _OF_PYTHON


_OF_PYTHON = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}


def _packages_in(folder: Path) -> list[str]:
    try:
        return sorted(each.name for each in folder.iterdir() if each.is_dir())
    except OSError:
        return []


def look_here() -> None:
    """Find modules in the current folder first, as `python -m` does, unless Python was told not to."""
    if not getattr(sys.flags, "safe_path", False) and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())


def named_package(name: str | None) -> LlavaPackage:
    """The LLaVA of a name that the user gives: a package's, or a module's as `run -m` takes it.

    Args:
        name: None for LLaVA itself, or where that is not installed for the only other one that is there.

    Raises:
        MixLoraError: there is no such LLaVA.
    """
    if name is None:
        others = [] if folder_of(ORIGINAL) is not None else llavas_beside(installed=True)
        return LlavaPackage(others[0] if len(others) == 1 else ORIGINAL)
    package = name.partition(".")[0]
    if not is_llava(package):
        there = ", ".join(dict.fromkeys([*filter(is_llava, [ORIGINAL]), *llavas_beside(installed=True)]))
        folder = folder_of(package)
        raise MixLoraError(
            f"--package {name}: {f'{folder} is no LLaVA' if folder else 'no such package'}; expected "
            f"{'one of ' + there if there else 'a LLaVA'}, or that its folder be on PYTHONPATH"
        )
    return LlavaPackage(package, (name,) if name != package else ())


def file_of(module: str) -> Path | None:
    """The file of a module, without importing what it lies in; of a package, the one that is run."""
    package, *inner = module.split(".")
    folder = folder_of(package)
    if folder is None:
        spec = importlib.util.find_spec(package) if not inner else None
        return Path(spec.origin) if spec is not None and spec.origin is not None else None
    place = folder.joinpath(*inner)
    files = (
        (place / "__main__.py", place.with_suffix(".py"), place / "__init__.py") if inner else (place / "__main__.py",)
    )
    return next((file for file in files if file.is_file()), None)


def folder_of(name: str) -> Path | None:
    """Where an import of a package finds it, without importing it; None where it is not installed, or is no package."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


@functools.cache
def _modules_of(package: str, folder: Path) -> dict[str, tuple[Defined, ...]]:
    found = {}
    for file in sorted(folder.rglob("*.py")):
        parts = [package, *file.relative_to(folder).with_suffix("").parts]
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = tuple(_defined(name, _tree(file)))
    return found


def _defined(module: str, tree: ast.Module) -> Iterator[Defined]:
    for node in _statements(tree.body):
        if isinstance(node, ast.ClassDef):
            bases = tuple(ast.unparse(base).rpartition(".")[2] for base in node.bases)
            methods = {inner.name for inner in node.body if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef))}
            yield Defined(module, node.name, bases, frozenset(methods))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield Defined(module, node.name)
        elif isinstance(node, ast.Assign):
            yield from (Defined(module, name.id) for name in node.targets if isinstance(name, ast.Name))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            source = getattr(node, "module", None)
            for alias in node.names:
                yield Defined(module, alias.asname or alias.name, imported=True, source=f"{source}:{alias.name}")


def _operands(node: ast.Compare | ast.Call) -> list[ast.expr]:
    """What a comparison compares, or what an `isinstance` is given."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    return node.args if isinstance(node.func, ast.Name) and node.func.id == "isinstance" else []


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, and those that it has within `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements([*node.body, *node.orelse, *getattr(node, "finalbody", ())])
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)


def _imported_modules(path: Path) -> list[str]:
    """Full names of the modules that a file imports by name, anywhere in it."""
    found = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            found.append(node.module)
    return found


def _name_by_folders(path: Path) -> str | None:
    """The name under which an import would find a file that lies in a package; None where it is not found so."""
    path = path.resolve()
    parts, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    package = folder_of(parts[0]) if len(parts) > 1 else None
    return ".".join(parts) if package is not None and package.resolve() in path.parents else None


def _model_type(tree: ast.Module) -> str | None:
    """What the configuration class of a language model's module calls it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "model_type":
            return ast.literal_eval(node.value)
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _tree(file: Path) -> ast.Module:
    try:
        return ast.parse(_text(file), str(file))
    except (SyntaxError, ValueError):  # running it will say so
        return ast.Module([], [])


def _depth(module: str) -> tuple[int, str]:
    return module.count("."), module
