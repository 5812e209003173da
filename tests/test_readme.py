"""README's promises that can be checked: its paper map, its commands' flags, the lines and imports of the scripts."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ("toto.py", "dvae.py", "data.py", "train.py", "probe.py", "sample.py")
STUDY = sorted(f"paper/{path.name}" for path in (ROOT / "paper").glob("*.py"))


def source_of(script, name):
    """The text of a function, class, method or constant of a script, with the comment lines right above it."""
    text = (ROOT / script).read_text()
    body, found = ast.parse(text).body, None
    for part in name.split("."):
        for node in body:
            names = [
                n.id for target in getattr(node, "targets", []) for n in ast.walk(target) if isinstance(n, ast.Name)
            ]
            if getattr(node, "name", None) == part or part in names:
                found, body = node, getattr(node, "body", [])
                break
        else:
            return None
    lines = text.splitlines()
    first = found.lineno - 1
    while first and lines[first - 1].strip().startswith("#"):
        first -= 1
    return "\n".join(lines[first : found.end_lineno])


ROWS = re.findall(
    r"^\| (.+?) \| .+? \| ((?:`[\w/]+\.py`: (?:`[\w.]+`(?:, )?)+(?:; )?)+) \|$", README, flags=re.MULTILINE
)
PLACES = [
    (reference, script, name)
    for references, places in ROWS
    for script, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", places)
    for name in re.findall(r"`([\w.]+)`", names)
    for reference in references.split(", ")
]


def test_the_map_covers_the_paper():
    mapped = {reference for reference, _, _ in PLACES}
    assert mapped >= {f"Eq. {i}" for i in (1, 2, 3, 4)} | {f"§3.{i}" for i in (1, 2, 3, 4, 5)} | {"Table 1", "Table 15"}


@pytest.mark.parametrize("reference, script, name", PLACES)
def test_the_map_leads_to_the_place(reference, script, name):
    source = source_of(script, name)
    assert source is not None, f"{script} has no {name}"
    assert re.search(re.escape(reference) + r"(?!\d)", source), f"{script}: {name} does not mention {reference}"


def test_every_flag_in_the_readme_exists():
    for script, line in re.findall(r"^(?:python|torchrun.*?) ([\w/]+\.py)(.*)$", README, flags=re.MULTILINE):
        text = (ROOT / script).read_text() + ((ROOT / "train.py").read_text() if script.startswith("paper/") else "")
        defined = set(re.findall(r'add(?:_argument)?\(\s*"(--[\w-]+)"', text))
        for flag in re.findall(r"(?<!\S)--[\w-]+", line):
            assert flag in defined, f"{script} has no {flag}"


@pytest.mark.parametrize("script", (*SCRIPTS, *STUDY))
def test_lines_fit(script):
    assert max(len(line) for line in (ROOT / script).read_text().splitlines()) <= 120


MAY_IMPORT = {"toto": set(), "data": {"toto"}, "dvae": {"data", "toto"}}
MAY_IMPORT |= dict.fromkeys(("train", "probe", "sample"), {"dvae", "data", "toto"})


def imports(node, place):
    """[(place, script that is imported there)] below a node of a syntax tree; a place is script or script.function."""
    found = []
    for child in ast.iter_child_nodes(node):
        is_named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        found += imports(child, f"{place}.{child.name}" if is_named else place)
        if isinstance(child, ast.Import):
            found += [(place, alias.name) for alias in child.names]
        if isinstance(child, ast.ImportFrom):
            found.append((place, child.module))
    return [(place, name) for place, name in found if name in MAY_IMPORT]


def test_imports_go_one_way():
    """Each script imports only what is below it; but data.main, a program, loads a tokenizer."""
    assert {f"{name}.py" for name in MAY_IMPORT} == set(SCRIPTS) == {path.name for path in ROOT.glob("*.py")}
    inside = []
    for script, allowed in MAY_IMPORT.items():
        found = imports(ast.parse((ROOT / f"{script}.py").read_text()), script)
        assert {name for place, name in found if place == script} <= allowed, script
        inside += [(place, name) for place, name in found if place != script]
    assert inside == [("data.main", "dvae")]


@pytest.mark.parametrize("script", STUDY)
def test_scripts_of_the_study_import_the_six_alone(script):
    names = {Path(other).stem for other in STUDY}
    nodes = list(ast.walk(ast.parse((ROOT / script).read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not names & (imported | {node.module for node in nodes if isinstance(node, ast.ImportFrom)})
