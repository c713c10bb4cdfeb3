"""The house: every module has its room, and imports what lies below it."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_stack

ROOT = Path(__file__).parents[2]
GROUND, ROOF = "on the ground", "on the roof"
ORDER = (
    GROUND,
    "method",
    "adapters",
    "data",
    "training",
    "patches",
    "integrations",
    "inference",
    "evaluation",
    "merging",
    "native",
    "analysis",
    "serving",
    "diagnosis",
    ROOF,
)
FLOORS = {
    GROUND: {
        *("errors", "limits", "inputs", "own_files", "lettering", "attention", "shipped", "interruption", "writing"),
        *("folder_lock", "llava_package", "llava_version", "import_failures"),
    },
    # The package itself registers the method, and says whether it could.
    "method": {"__init__"},
    ROOF: {"launch", "cli", "__main__"},
}


def modules(package, folder):
    """The files of a package by dotted name; `llava_mixlora.patches` lies in a folder of its own."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        if not {"cache", "output", "lmms_tasks"} & set(parts):
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


LIBRARY = {
    **modules("llava_mixlora", ROOT / "llava_mixlora"),
    **modules("llava_mixlora.patches", ROOT / "patches"),
}
PLAYGROUND = modules("playground", ROOT / "playground")


def imports(name, file, known):
    """The modules among `known` that a module names in an import, wherever in it, for type checking too."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in known or source in known:
                    yield inner if inner in known else source


def graph(known):
    return {name: set(imports(name, file, known)) - {name} for name, file in known.items()}


@pytest.mark.parametrize("known", [LIBRARY, PLAYGROUND], ids=["library", "playground"])
def test_no_module_imports_itself_in_a_circle(known):
    found = graph(known)
    assert sum(map(len, found.values())) > len(found) // 2
    try:
        tuple(TopologicalSorter(found).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1][::-1]))


def test_a_circle_and_an_import_inside_a_function_would_be_seen(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "one.py").write_text("from .two import something\n")
    (tmp_path / "two.py").write_text("def late():\n    from . import one\n")
    with pytest.raises(CycleError):
        tuple(TopologicalSorter(graph(modules("house", tmp_path))).static_order())


def floor_of(name):
    room, _, inner = name.removeprefix("llava_mixlora").lstrip(".").partition(".")
    if inner or (ROOT / "llava_mixlora" / room).is_dir() or room == "patches":
        return room or "method"
    return next(floor for floor, names in FLOORS.items() if room in names)


def test_every_room_has_its_floor_and_no_module_imports_a_room_above_it():
    assert {floor_of(name) for name in LIBRARY} == set(ORDER)
    upward = [
        f"{name} imports {imported}"
        for name, all_imported in graph(LIBRARY).items()
        for imported in all_imported
        if ORDER.index(floor_of(imported)) > ORDER.index(floor_of(name)) and name != "llava_mixlora"
    ]
    assert upward == []


def test_method_imports_what_lies_on_the_ground_and_no_other_room():
    of_method = {name: found for name, found in graph(LIBRARY).items() if name.startswith("llava_mixlora.method")}
    outside = {imported for found in of_method.values() for imported in found} - set(of_method)
    assert len(of_method) > 10
    assert outside == {f"llava_mixlora.{name}" for name in ("errors", "inputs", "limits", "own_files", "writing")}


def test_method_imports_nothing_of_llava():
    for file in (ROOT / "llava_mixlora" / "method").glob("*.py"):
        assert not re.search(r"^\s*(from|import) llava\b", file.read_text(encoding="utf-8"), flags=re.M), file


def test_nothing_imports_what_needs_another_framework():
    importers = {
        name
        for name, found in graph(LIBRARY).items()
        if any(imported.startswith("llava_mixlora.integrations") for imported in found)
    }
    assert importers and {floor_of(name) for name in importers} == {"integrations"}


def test_every_room_says_what_lives_there():
    rooms = [file for file in (ROOT / "llava_mixlora").glob("*/__init__.py")]
    assert len(rooms) == len(ORDER) - 3  # the ground, the roof, and patches, which has its own folder
    for file in (*rooms, *(ROOT / "playground").glob("*/__init__.py")):
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file


def test_tests_mirror_the_code():
    for tests, code in ((ROOT / "tests" / "llava_mixlora", LIBRARY), (ROOT / "tests" / "playground", PLAYGROUND)):
        rooms = {name.split(".")[1] for name in code if name.count(".") > 1}
        assert {folder.name for folder in tests.iterdir() if any(folder.glob("test_*.py"))} <= rooms


def test_wheel_holds_every_package():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    packages = {name for name, file in LIBRARY.items() if file.stem == "__init__"}
    assert set(listed) == packages | {"llava_mixlora.scripts"}


def test_table_of_the_rooms_is_in_the_order_of_the_floors():
    text = (ROOT / "llava_mixlora" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/`", text, flags=re.M) == list(ORDER[1:-1])
