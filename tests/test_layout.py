"""The layout of the project: imports run downwards, and flags are answered before PyTorch is imported."""

import ast

import utils
from tests.faults import FAULTS
from tests.helpers import ROOT

ROOMS = ("model", "data", "experiment")
# Files of which room or floor a file may import.
BELOW = {"ground": {"ground"}, "model": {"model", "ground"}, "data": {"data", "ground"}}
BELOW["upper"] = {"upper", *BELOW["model"], *BELOW["data"]}
BELOW["scripts"] = {"scripts", *BELOW["upper"]}


def sources():
    """{module name: its source file} of the whole project but the tests."""
    files = [ROOT / "main.py", ROOT / "finetune.py"]
    files += [file for room in ("utils", *ROOMS) for file in sorted((ROOT / room).rglob("*.py"))]
    modules = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in modules.items()}


def floor_of(module):
    room, _, name = module.partition(".")
    if room == "utils":
        return "ground" if name in utils.GROUND_FLOOR else "upper"
    return room if room in ("model", "data") else "scripts"


def nodes(tree):
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node)


def imports():
    """The pairs (importing module, imported module), also within functions, but not those for type checkers alone."""
    modules, pairs = sources(), set()
    for module, file in modules.items():
        for node in nodes(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                pairs |= {(module, alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} has a relative import"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    pairs.add((module, inner if inner in modules else node.module))
    return {(importer, imported) for importer, imported in pairs if imported in modules and imported != "utils"}


def reachable(pairs, start):
    found, left = set(), [start]
    while left:
        module = left.pop()
        new = {imported for importer, imported in pairs if importer == module} - found
        found |= new
        left += new
    return found


def test_every_file_of_utils_stands_on_one_floor():
    names = {file.stem for file in (ROOT / "utils").glob("*.py")} - {"__init__"}
    assert set(utils.GROUND_FLOOR).isdisjoint(utils.UPPER_FLOOR)
    assert names == {*utils.GROUND_FLOOR, *utils.UPPER_FLOOR}


def test_no_import_runs_upwards():
    upwards = {pair for pair in imports() if floor_of(pair[1]) not in BELOW[floor_of(pair[0])]}
    assert upwards == set()


def test_no_files_import_each_other():
    pairs = imports()
    assert {pair for pair in pairs if pair[0] in reachable(pairs, pair[1])} == set()


def test_an_import_leaves_the_filters_of_warnings_as_they_are():
    calls = {
        module
        for module, file in sources().items()
        for statement in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("warnings.")
    }
    assert calls == set()


def test_deliberate_faults_can_be_made():
    for fault in FAULTS:
        assert (ROOT / fault.path).read_text(encoding="utf-8").count(fault.before) == 1, fault.name
        assert all((ROOT / word).is_file() for word in fault.tests.split() if word.endswith(".py")), fault.name
