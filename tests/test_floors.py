"""Imports point down: no module imports, when it is loaded, one of a higher floor (docs/extending.md)."""

import ast

FLOORS = (
    ("quiet", "progress", "provenance", "durable", "strict", "config", "weights", "hub", "testing", "tables", "distributed"),
    ("reference", "schedule"),
    ("kernels",),
    ("counter",),
    ("arguments",),
    ("ops",),
    ("data",),
    ("student", "teacher"),
    ("crossmodal",),
    ("recipes",),
    ("world",),
    ("evaluation",),
    ("optimizer", "metrics", "profiling", "engine", "jobs"),
    ("history",),
    ("figures",),
    ("sharding", "checkpoint", "report", "training"),
    ("train", "comparison", "export", "check_teacher", "plan", "doctor"),
    ("reproduce",),
    ("demo",),
    ("cli",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def loaded(path):
    """Names of fastsds's modules that a file imports at its top level, at `try` and `if` included, in functions not."""
    waiting = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastsds":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("fastsds."))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def test_imports_point_down(root):
    files = {path: path.relative_to(root / "fastsds").parts[0].removesuffix(".py") for path in root.glob("fastsds/**/*.py")}
    files |= {path: "kernels" for path in root.glob("kernels/*.py")}
    files.pop(root / "fastsds" / "__init__.py")
    unknown = {name for name in files.values() if name not in FLOOR}
    assert not unknown, f"which floor are these on? {unknown}"
    for path, name in files.items():
        for other in loaded(path):
            assert FLOOR[other] <= FLOOR[name], f"{path.relative_to(root)} imports {other}, which is above {name}"
