"""The floors of the house, kept by a test: who may import whom, third parties at home, files that stay readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jaxstages"

FLOORS = [
    {
        *("__init__", "types", "guard", "disk", "signals", "hosts", "cluster", "process"),
        *("config", "data_config", "mesh_config", "world"),
    },
    {
        *("losses", "optim", "early_stopping", "sharding", "metrics", "console", "workdir", "verdict"),
        *("manifest", "fingerprint", "record"),
        *(
            "data.sources",
            "data.conversation",
            "data.template",
            "data.sentencepiece",
            "data.tokenizer",
            "data.prefetch",
            "data.duplicates",
            "models.primitives",
            "models.activations",
            "models.attention",
            "models.kernels",
            "models.rope",
            "models.experts",
            "models.lora",
            "models.unstacked",
            "models.spread",
        ),
    },
    {
        "new_tokens",
        "models.layers",
        "models.transformer",
        "data.answers",
        "data.chat",
        "data.tasks",
        "data.packing",
        "data.clean",
    },
    {"step", "arrays", "checkpoint", "data.shards", "data.prepare", "data.pipeline", "data.mixture", "decode"},
    {"workbench", "parent", "anchor", "start", "evaluate", "compilation"},
    {"loop"},
    {"stages"},
    {"interop", "report", "plan", "serve", "beam", "commands"},
    {"main", "command_line", "__main__"},
]
"""Floor 0 first. A name stands for a module, or for a folder with all that is in it."""

SAME_FLOOR = {"data.tasks": {"data.chat"}, "data.packing": {"data.tasks"}, "decode.label": {"data.pipeline"}}
SAME_FLOOR |= {"data.conversation": {"data.sources"}}
SAME_FLOOR |= {"data.tokenizer": {"data.template", "data.sentencepiece"}, "data.chat": {"data.answers"}}
SAME_FLOOR |= {"data.clean": {"data.tasks"}, "data.prepare": {"data.shards"}, "config": {"data_config", "mesh_config"}}
SAME_FLOOR |= {
    "data.pipeline": {"data.prepare"},
    "data.mixture": {"data.pipeline", "data.prepare"},
    "anchor": {"workbench"},
    "parent": {"workbench"},
    "start": {"workbench", "parent", "anchor"},
    "evaluate": {"workbench"},
    "compilation": {"workbench"},
}
SAME_FLOOR |= {"models.lora": {"models.primitives"}, "checkpoint": {"arrays"}, "record": {"manifest", "workdir"}}
SAME_FLOOR |= {
    "models.primitives": {"models.spread"},
    "models.activations": {"models.primitives"},
    "models.attention": {"models.primitives", "models.spread"},
    "models.kernels": {"models.attention"},
    "models.transformer": {"models.layers"},
    "sharding": {"models.spread"},
}
SAME_FLOOR |= {
    "decode.generate": {"decode.sampling"},
    "decode.stream": {"decode.generate", "decode.sampling"},
}
SAME_FLOOR |= {
    "__main__": {"main"},
    "main": {"command_line"},
    "types": {"guard"},
    "hosts": {"signals", "cluster", "types"},
}
"""What may look sideways: a module to its neighbour that stands, in the table of DESIGN, before it."""

HOMES = {
    "flax": {"models"},
    "grain": {"data.pipeline", "data.prepare"},
    "orbax": {"arrays", "checkpoint"},
    "tokenizers": {"data.tokenizer", "data.sentencepiece"},
    "jinja2": {"data.template"},
    "sacrebleu": {"metrics"},
    "tensorboardX": {"metrics"},
    "tensorflow_datasets": {"data.sources", "world"},
    "array_record": {"data.sources", "data.shards"},
    "apache_beam": {"beam"},
    "absl": {"main", "command_line"},
    "ml_collections": {"command_line"},
}

PURE = {"step": {"data", "checkpoint", "config", "workdir"}, "models": {"optim", "step", "losses", "data", "loop"}}
"""step.py knows nothing of data, disk or config; models/ knows nothing of training."""

CORE = 7
"""Floors 0 to 6."""

BUDGETS = {"step": (8, 1440), "models.transformer": (15, 2320), "loop": (65, 11600)}
"""Entry point -> the modules and lines that a reader of it can reach, by imports at the top of modules."""


def modules() -> dict[str, Path]:
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__") if name != "__init__" else name: path for name, path in files.items()}


def within(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")


def floor_of(name: str) -> int:
    found = [level for level, names in enumerate(FLOORS) for group in names if within(name, group)]
    if not found and any(other.startswith(f"{name}.") for other in modules()):
        return 0  # a folder's empty __init__
    assert len(found) == 1, f"{name} has no floor, or more than one: {found}"
    return found[0]


def imports_of(path: Path) -> set[str]:
    """Full dotted names of all that a file imports, inside functions too."""
    return imports_in(ast.parse(path.read_text()), path)


def imports_in(tree: ast.Module, path: Path) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """Modules of jaxstages that a file imports."""
    return ours_in(ast.parse(path.read_text()), path)


def ours_in(tree: ast.Module, path: Path) -> set[str]:
    known = modules()
    found = set()
    for name in imports_in(tree, path):
        parts = name.split(".")
        if parts[0] == "jaxstages":
            inner = ".".join(parts[1:])
            found.add(inner if inner in known else ".".join(parts[1:-1]) or "__init__")
    return found


def test_imports_go_down() -> None:
    for name, path in modules().items():
        for target in ours(path):
            if floor_of(target) < floor_of(name) or any(
                within(name, g) and within(target, g) for g in ("world", "commands", "interop", "plan")
            ):
                continue
            sideways = target in SAME_FLOOR.get(name, set())
            wings = floor_of(name) == floor_of(target) == CORE and within(name, "commands")
            assert sideways or wings, f"{name} (floor {floor_of(name)}) imports {target} (floor {floor_of(target)})"


def test_no_cycles() -> None:
    graph = {name: ours(path) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_third_parties_stay_at_home() -> None:
    for name, path in modules().items():
        for imported in imports_of(path):
            homes = HOMES.get(imported.split(".")[0])
            assert homes is None or any(within(name, home) for home in homes), f"{name} imports {imported}"


def test_pure_parts() -> None:
    for group, forbidden in PURE.items():
        for name, path in modules().items():
            if within(name, group):
                bad = [t for t in ours(path) for f in forbidden if within(t, f)]
                assert not bad, f"{name} must know nothing of {bad}"


def test_stages_never_import_each_other_and_are_short() -> None:
    for name, path in modules().items():
        if within(name, "stages") and name != "stages":
            assert not any(within(target, "stages") for target in ours(path))
            assert len(path.read_text().splitlines()) < 100


def reached(name: str) -> set[str]:
    """Modules with code that a module's own top-level imports lead to, itself among them."""
    found, queue = set(), [name]
    while queue:
        module = queue.pop()
        path = modules()[module]
        if module in found or not path.read_text().strip():
            continue
        found.add(module)
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        queue += ours_in(tree, path)
    return found


@pytest.mark.parametrize("name", BUDGETS)
def test_entry_points_stay_small(name: str) -> None:
    """No limit on the length of a file: that makes dense code. What counts is what one has to read to follow it."""
    most_modules, most_lines = BUDGETS[name]
    closure = reached(name)
    lines = sum(len(modules()[module].read_text().splitlines()) for module in closure)
    assert len(closure) <= most_modules, f"{name} reaches {len(closure)} modules: {sorted(closure)}"
    assert lines <= most_lines, f"{name} reaches {lines} lines"


def test_no_drawers_globals_or_kwargs() -> None:
    for name, path in modules().items():
        assert not any(word in name.split(".")[-1] for word in ("util", "helper", "common", "misc")), name
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Global), f"{name}: global"
            if isinstance(node, ast.FunctionDef) and node.args.kwarg:
                # optax's own protocol for `value=loss` is the one place.
                assert name == "optim", f"{name}.{node.name} takes **{node.args.kwarg.arg}"
