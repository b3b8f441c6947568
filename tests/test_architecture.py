"""The packages and their levels: imports go down, third-party libraries stay in their home packages."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jaxstages"

LEVELS = (
    {"types", "config"},
    {"runtime", "models", "world"},
    {"data", "checkpoint"},
    {"generation"},
    {"training"},
    {"stages"},
    {"interop", "plan", "experiments"},
    {"cli"},
)
"""A package imports only from lower levels. `__init__`, `__main__` and `testing` are the public entry points."""

ENTRY_POINTS = {"__init__", "__main__", "api", "testing"}

HOMES = {
    "flax": {"models"},
    "grain": {"data"},
    "orbax": {"checkpoint"},
    "tokenizers": {"data"},
    "jinja2": {"data.chat_template"},
    "sacrebleu": {"generation.metrics"},
    "tensorboardX": {"training.event_file"},
    "lm_eval": {"cli.lm_eval"},
    "wandb": {"training.trackers"},
    "mlflow": {"training.trackers"},
    "tensorflow_datasets": {"data.sources", "world"},
    "array_record": {"data"},
    "apache_beam": {"data.beam"},
    "matplotlib": {"experiments"},
    "tabulate": {"experiments.compare"},
    "gguf": {"interop.gguf_export"},
    "absl": {"cli"},
    "starlette": {"generation.serving"},
    "uvicorn": {"cli.serve"},
    "prometheus_client": {"generation.serving.metrics"},
    "ml_collections": {"cli"},
}

BUDGETS = {"training.step": (8, 900), "models.transformer": (15, 2200), "training.loop": (35, 6000)}
"""Entry point -> the most modules and lines that its module-level imports reach."""


def modules() -> dict[str, Path]:
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def imports(tree: ast.Module) -> set[str]:
    """Full dotted names of everything that a module imports, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def internal_imports(tree: ast.Module) -> set[str]:
    """Modules of jaxstages that a module imports."""
    known, targets = modules(), set()
    for name in imports(tree):
        package, _, inner = name.partition(".")
        if package == "jaxstages":
            targets.add(inner if inner in known else inner.rpartition(".")[0] or "__init__")
    return targets


def level_of(module: str) -> int:
    (level,) = [level for level, packages in enumerate(LEVELS) if module.split(".")[0] in packages]
    return level


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("name", sorted(set(modules()) - ENTRY_POINTS))
def test_a_package_imports_only_from_lower_levels(name: str) -> None:
    for target in internal_imports(ast.parse(modules()[name].read_text())):
        same_package = target.split(".")[0] == name.split(".")[0]
        if target in ENTRY_POINTS:
            assert level_of(name) == len(LEVELS) - 1, f"{name} imports {target}"
            continue
        assert same_package or level_of(target) < level_of(name), f"{name} imports {target}"


def test_no_cycles() -> None:
    graph = {name: internal_imports(ast.parse(path.read_text())) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_third_party_libraries_stay_in_their_home_packages() -> None:
    for name, path in modules().items():
        for imported in imports(ast.parse(path.read_text())):
            homes = HOMES.get(imported.split(".")[0])
            assert homes is None or any(within(name, home) for home in homes), f"{name} imports {imported}"


def test_there_are_about_sixteen_entries_at_the_top() -> None:
    entries = [path.name for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 19, sorted(entries)


def reached(name: str) -> set[str]:
    """Non-empty modules that a module's own top-level imports lead to, itself among them."""
    closure: set[str] = set()
    queue = [name]
    while queue:
        module = queue.pop()
        text = modules()[module].read_text()
        if module in closure or not text.strip():
            continue
        closure.add(module)
        tree = ast.parse(text)
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        queue += internal_imports(tree)
    return closure


@pytest.mark.parametrize("name", BUDGETS)
def test_entry_points_stay_small(name: str) -> None:
    """A file has no limit on its length, which makes dense code. What counts is what one reads to follow it."""
    most_modules, most_lines = BUDGETS[name]
    closure = reached(name)
    lines = sum(len(modules()[module].read_text().splitlines()) for module in closure)
    assert len(closure) <= most_modules, f"{name} reaches {len(closure)} modules: {sorted(closure)}"
    assert lines <= most_lines, f"{name} reaches {lines} lines"


def test_no_drawers_and_no_globals() -> None:
    for name, path in modules().items():
        assert not any(word in name.split(".")[-1] for word in ("util", "helper", "common", "misc")), name
        assert not any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(path.read_text()))), name
