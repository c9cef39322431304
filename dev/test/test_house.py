"""
The rules of the house that a program can check: what the README's "How it is built" promises of files, imports, sizes.

A check takes a file's path from the top of the project and its syntax tree, and yields (line, what it found there).
Each is shown a piece of code that breaks its rule, too.
"""
import ast
import subprocess

import pytest
from conftest import ROOT

TOP = {"train_gpt2.py", "test_gpt2.py", "Makefile", "requirements.txt", "README.md", "LICENSE", "data", "dev"}

FILES = {path.relative_to(ROOT).as_posix(): path for folder in (".", "dev", "dev/*", "dev/*/*")
         for path in ROOT.glob(f"{folder}/*.py") if "test" not in path.relative_to(ROOT).parts}
TREES = {name: ast.parse(path.read_text(), name) for name, path in sorted(FILES.items())}
OURS = {"train_gpt2", "test_gpt2", "dev"}


# ---------------------------------------------------------------------------------------------------------------------
# what a syntax tree says

def imports(tree, everywhere=True):
    """(line, dotted name) of all that is imported, in functions too or only when the module is"""
    for node in ast.walk(tree) if everywhere else outside_functions(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def outside_functions(node):
    """The nodes that run when a module is imported"""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield child
            yield from outside_functions(child)


def functions(tree):
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def decorators(function):
    return [ast.unparse(decorator) for decorator in function.decorator_list]


def is_cached(function):
    """Is it compiled, and kept in Numba's cache?"""
    return any(text.split(".")[-1] in ("kernel", "inner", "exact") or "cache=True" in text
               for text in decorators(function))


# ---------------------------------------------------------------------------------------------------------------------
# the rules

def one_way(name, tree):
    """Imports go one way: dev/run <- train_gpt2.py <- dev/eval, generate, bench; dev/run <- dev/engine."""
    folder = "/".join(name.split("/")[:2])
    allowed = {"dev/run": ["dev.run"], "dev/engine": ["dev.run", "dev.engine"], "dev/data": ["dev.run", "dev.data"],
               "train_gpt2.py": ["dev.run"]}.get(folder)
    for line, module in imports(tree, everywhere=name != "train_gpt2.py"):
        if allowed and module.split(".")[0] in OURS and not any(f"{module}.".startswith(f"{a}.") for a in allowed):
            yield line, f"imports {module}"


def no_gpu_in_the_program(name, tree):
    """Nothing in train_gpt2.py and dev/run/ needs a GPU's packages, not even inside a function."""
    if name == "train_gpt2.py" or name.startswith("dev/run/"):
        for line, module in imports(tree):
            if {"cuda", "cupy", "nvidia", "pynvml", "torch", "triton"} & set(module.split(".")):
                yield line, f"imports {module}"


def short_kernels(name, tree):
    """A kernel has at most 40 lines."""
    for function in functions(tree):
        compiled = is_cached(function) or any("jit" in text or text == "intrinsic" for text in decorators(function))
        lines = function.end_lineno - function.lineno + 1
        if compiled and lines > 40:
            yield function.lineno, f"{function.name} has {lines}"


def one_page(name, tree):
    """train_gpt2.py has at most 1,500 lines."""
    if name == "train_gpt2.py":
        lines = len(FILES[name].read_text().splitlines())
        if lines > 1500:
            yield lines, f"is the number of its last line: {lines}"


@pytest.mark.parametrize("rule", [one_way, no_gpu_in_the_program, short_kernels, one_page])
def test_rule(rule):
    found = [f"{name}:{line}: {what}" for name, tree in TREES.items() for line, what in rule(name, tree)]
    assert not found, "\n".join([rule.__doc__, *found])


LONG = "\n    pass" * 80


@pytest.mark.parametrize("rule, name, code", [
    (one_way, "dev/run/text.py", "def f():\n    import train_gpt2"),
    (one_way, "dev/run/text.py", "from dev import data"),
    (one_way, "dev/engine/cuda.py", "from train_gpt2 import GPT2"),
    (one_way, "train_gpt2.py", "import dev.engine.cuda"),
    (one_way, "dev/data/text.py", "from dev.eval.export_hf import main"),
    (no_gpu_in_the_program, "train_gpt2.py", "def f():\n    from numba import cuda"),
    (no_gpu_in_the_program, "dev/run/machine.py", "def f():\n    import torch.cuda"),
    (short_kernels, "train_gpt2.py", f"@kernel\ndef f():{LONG[:41 * 9]}"),
    (short_kernels, "dev/engine/cuda_kernels.py", f"@cuda.jit(fastmath=True)\ndef f():{LONG[:41 * 9]}"),
])
def test_rules_are_noticed_when_broken(rule, name, code):
    assert list(rule(name, ast.parse(code)))


# ---------------------------------------------------------------------------------------------------------------------
# what is not in a syntax tree

def test_top_of_the_house():
    """What is visible at the top is TOP, nothing else: of the files that are committed."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if not git.stdout:
        pytest.skip("no git repository, or no git")
    visible = {path.split("/")[0] for path in git.stdout.splitlines() if path[0] not in '."'}
    assert visible == TOP


LOADED = "import sys; import train_gpt2; print(*sys.modules)"


def test_what_the_trainer_loads(python):
    """Neither a GPU's packages nor MPI's, nor other engines: importing train_gpt2 needs NumPy and Numba."""
    out, err = python("-c", LOADED).communicate()
    loaded = set(out.split())
    assert {"train_gpt2", "numba", "numpy", "dev.run.flags"} <= loaded, err
    assert not {name for name in loaded if name.split(".")[0] in ("mpi4py", "torch", "cupy", "cuda", "nvidia")}
    assert not {name for name in loaded if name.startswith(("dev.", "numba.cuda")) and not name.startswith("dev.run")}
