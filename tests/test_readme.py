"""README's promises that can be checked: its paper map, its commands' flags, the lines and imports of the scripts."""

import ast
import json
import re
from pathlib import Path

import pytest

import probe

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


# The study at a glance: each number that is stated there is in the file of results that its cell links.
STUDY_PAGE = (ROOT / "paper" / "README.md").read_text()
GLANCE = {
    cells[0]: cells
    for line in STUDY_PAGE.splitlines()
    if line.startswith("|") and len(cells := [cell.strip() for cell in line.strip("|").split(" |")]) == 7
}
GLANCE = {name: cells for name, cells in GLANCE.items() if re.fullmatch(r"(Table|Fig\.) \d+|A\.8", name)}
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
TRIPLE = re.compile(rf"(?<![\w.^-])({NUMBER})(?: %)? \(({NUMBER}) to ({NUMBER})\)")


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def mean_of(x):
    return sum(map(mean_of, x)) / len(x) if isinstance(x, list) else x


def results_of(x):
    """(mean, low, high) of all that a file of results holds: intervals None where there are none.

    Lists are runs (Student's interval over their means) or layers of runs (over each column), lists of truth values are
    trials (Wilson's). The n-grams' curves, which hold almost every number, are left out.
    """
    if is_number(x) or isinstance(x, str) and x.isdigit():
        yield (x if is_number(x) else int(x)), None, None
    if isinstance(x, dict):
        if "interval" in x:
            yield x["top1"], *x["interval"]
        for key in x.keys() - {"ranks", "shares"}:
            yield from results_of(key)
            yield from results_of(x[key])
    if not isinstance(x, list) or not x:
        return
    if all(isinstance(value, bool) for value in x):
        yield mean_of(x), *probe.wilson(mean_of(x), len(x))
        return
    if len(x) == 3 and all(map(is_number, x)) and x[1] <= x[0] <= x[2]:
        yield tuple(x)
    if all(isinstance(value, dict) for value in x):
        for key in x[0]:
            if all(is_number(value.get(key)) for value in x):
                yield probe.over_seeds([value[key] for value in x])
    try:
        yield probe.over_seeds([mean_of(value) for value in x])
        if all(isinstance(value, list) for value in x):
            yield from (probe.over_seeds(column) for column in zip(*x) if all(map(is_number, column)))
    except TypeError:  # words, or no number at all
        pass
    if x[1:] == [None, None]:  # a mean that has no interval
        yield from results_of(x[0])
    for value in x:
        if not isinstance(value, float):  # one run's alone is nothing to state
            yield from results_of(value)


def is_printed(text, value):
    """Whether a number is printed as `text`, to its digits; bounds may be cut at 0 and at 100 per cent."""
    shown, digits = float(text.replace(",", "")), len(text.partition(".")[2])
    return any(abs(shown - x) <= 0.5 * 10**-digits + 1e-9 for x in {value, min(max(value, 0), 100)})


def is_result(word, found):
    """Whether a number that stands alone is one that has no interval; whole ones must be whole there too, as counts."""
    alone = [mean for mean, low, high in found if low == high]
    if "." not in word:
        return any(isinstance(mean, int) and mean == int(word.replace(",", "")) for mean in alone)
    return any(is_printed(word, mean) for mean in alone)


def not_in_the_results(cell):
    """The numbers of a cell, alone or with their interval, that the files of results which it links do not hold."""
    files = re.findall(r"\]\((results/\w+\.json)\)", cell)
    found = [of for file in files for of in results_of(json.loads((ROOT / "paper" / file).read_text()))]
    found += [tuple(v if v is None else 100 * v for v in of) for of in found if abs(of[0]) <= 1]  # shares in per cent
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell)
    with_interval = [of for of in found if of[1] is not None]
    holds = lambda words: any(all(map(is_printed, words, of)) for of in with_interval)
    missing = [words for words in TRIPLE.findall(text) if not holds(words)]
    alone = [word.rstrip(",") for word in re.findall(rf"(?<![\w.^-]){NUMBER}", TRIPLE.sub("", text))]
    return missing + [word for word in alone if not is_result(word, found)]


def test_the_glance_has_all_tables_and_figures():
    asked = [f"Table {i}" for i in range(1, 17)] + [f"Fig. {i}" for i in range(2, 15)]
    assert [name for name in GLANCE if name != "A.8"] == asked


@pytest.mark.parametrize("name", GLANCE)
def test_a_row_of_the_glance_leads_to_its_script_and_picture(name):
    _, _, _, command, here, verdict, picture = GLANCE[name]
    for link in re.findall(r"\]\(([\w./]+)\)", picture + here):
        assert (ROOT / "paper" / link).is_file(), link
    script = re.match(r"`([\w/]+\.py)", command)
    if script:
        (path,) = [path for path in (ROOT / "paper" / script[1], ROOT / script[1]) if path.exists()]
        assert re.search(re.escape(name) + r"(?!\d)", path.read_text()), f"{path} does not mention {name}"
    assert re.search(r"\*\*(holds|does not hold|cannot tell)\*\*|^not a claim$", verdict)
    assert script or verdict == "not a claim"


@pytest.mark.parametrize("name", [name for name, cells in GLANCE.items() if "results/" in cells[4]])
def test_the_glance_states_what_the_results_hold(name):
    here = GLANCE[name][4]
    assert not_in_the_results(here) == []
    for planted in TRIPLE.finditer(here):  # a mean, or a bound, that is wrong is found out
        for group in (1, 2, 3):
            wrong = "98765.4"
            assert not_in_the_results(here[: planted.start(group)] + wrong + here[planted.end(group) :])


@pytest.mark.parametrize(
    "name, right, wrong",
    [("Fig. 12", "17,666", "17,667"), ("Fig. 3", "28.7", "28.8"), ("Fig. 5", "51.1", "51.2"), ("A.8", "98.9", "98.8")],
)
def test_a_wrong_number_in_the_glance_is_found(name, right, wrong):
    cell = GLANCE[name][4]
    assert right in cell and not_in_the_results(cell.replace(right, wrong)) == [wrong]
