"""The house rules that a program can check: sizes of files and functions, layers, banned constructs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "eightfold"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8

# A module may import modules of the rows above its own, no others. Every module stands here once.
LAYERS = (
    ("cuda",),
    ("codebook", "rotation", "parallel", "bundled", "queued", "activations", "team", "allocation", "options", "finite"),
    ("e8shell", "moments"),
    ("e8p",),
    ("rvq", "tensor_parallel"),
    ("ldlq", "format"),
    ("folder",),
    ("prepare", "files", "fused"),
    ("quantize", "workspace"),
    ("linear", "skeleton", "calibration", "checkpoint", "glq_tensors", "rates"),
    ("model", "hf", "glq"),
    ("loading", "cost"),
    ("evaluate", "sensitivity", "stream", "hf_glq", "glq_folder", "rate_losses", "vllm_parameters", "shapes"),
    ("sizes",),
    ("preflight", "vllm"),
    ("gate", "spread", "vllm_glq"),
    ("walk",),
    ("pipeline", "inspect", "console", "convert", "launch", "vllm_plugin"),
    ("report", "verify", "card", "batch", "serve_bench"),
    ("demo", "push", "serve_report"),
    ("commands", "publishing", "bench"),
    ("cli",),
    ("__main__",),
)
LAYER_OF = {name: layer for layer, row in enumerate(LAYERS) for name in row}

# The one module that may read the environment: the name of the cache folder.
READS_ENVIRONMENT = "cuda"

# Slow to import or not always there: not to be imported by `import eightfold`.
HEAVY = {"torch", "transformers", "accelerate", "matplotlib", "vllm"}

FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """`e8p` for e8p.py, `kernels` for every file under kernels/, `` for the package's __init__.py."""
    first = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "" if first == "__init__" else first


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imported(node: ast.AST) -> list[str]:
    """Dotted names that one statement imports: `from a import b` gives a and a.b."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), names=names, level=0):
            return [module, *(f"{module}.{alias.name}" for alias in names)]
        case ast.Call(func=ast.Name(id="import_module"), args=[ast.Constant(value=str(module))]):
            return [module]
    return []


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes under `node` that run when its module is imported: no function bodies, no `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from run_at_import(child)


def siblings(names: list[str]) -> set[str]:
    """The modules of this package among imported dotted names; the package itself is not one."""
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "eightfold" and len(part) > 1 and part[1] in LAYER_OF}


@every_file
def test_file_length(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@every_file
def test_function_length(path):
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(parse(path))}
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}


@every_file
def test_parameters(path):
    counts = {}
    for node in functions(parse(path)):
        a = node.args
        every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x)]
        counts[node.name] = len([x for x in every if x.arg not in ("self", "cls")])
    assert not {name: count for name, count in counts.items() if count > MAX_PARAMETERS}


def test_every_module_has_one_layer():
    assert len(LAYER_OF) == sum(map(len, LAYERS)), "a module stands in two rows of LAYERS"
    assert {module_name(path) for path in FILES} - {""} == set(LAYER_OF), "LAYERS and the files differ"


@every_file
def test_imports_go_down(path):
    name = module_name(path)
    own = LAYER_OF.get(name, len(LAYERS))
    found = set().union(*(siblings(imported(node)) for node in ast.walk(parse(path)))) - {name}
    assert not {other for other in found if LAYER_OF[other] >= own}
    assert not [node for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom) and node.level]


@every_file
def test_environment_is_read_in_one_place(path):
    reads = [
        node.lineno
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
        or {"os.environ", "os.getenv"} & set(imported(node))
    ]
    assert not reads or module_name(path) == READS_ENVIRONMENT


@every_file
def test_no_blanket_except(path):
    def blanket(handler: ast.ExceptHandler) -> bool:
        if handler.type is None:
            return True
        return any(isinstance(x, ast.Name) and x.id == "Exception" for x in ast.walk(handler.type))

    handlers = [node for node in ast.walk(parse(path)) if isinstance(node, ast.ExceptHandler)]
    assert not [handler.lineno for handler in handlers if blanket(handler)]


def test_import_eightfold_is_light():
    """Follow what runs at import from the package's __init__.py: nothing heavy is reached."""
    todo, seen, heavy = [PACKAGE / "__init__.py"], set(), set()
    while todo:
        path = todo.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        names = [name for node in run_at_import(parse(path)) for name in imported(node)]
        heavy |= {(path.name, name) for name in names if name.split(".")[0] in HEAVY}
        todo += [PACKAGE / f"{name}.py" for name in siblings(names)]
    assert not heavy
