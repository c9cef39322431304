"""
The rules of the house that a program can check: what the README's "How it is built" promises of files, imports, sizes.

A check takes a file's path from the top of the project and its syntax tree, and yields (line, what it found there).
Each is shown a piece of code that breaks its rule, too.
"""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

TOP = {"train_gpt2.py", "test_gpt2.py", "Makefile", "requirements.txt", "README.md", "LICENSE", "data", "dev"}
REQUIREMENTS = {"numpy", "numba", "llvmlite", "tiktoken", "requests"}
FORMATS = {20240520, 20240522, 20240326, 20240327, 20240527, 20240328}  # the magic numbers of llm.c's files
SETTINGS = {
    ("dev/run/mpi.py", "mpi4py.rc.thread_level"), ("dev/run/mpi.py", "sys.excepthook"),
    ("dev/run/mpi.py", "threading.excepthook"), ("dev/engine/gpu.py", "numba.config.CUDA_LOW_OCCUPANCY_WARNINGS"),
    ("dev/run/compiling.py", "numba.config.CACHE_DIR"), ("dev/run/compiling.py", "numba.config.CPU_FEATURES"),
}

FILES = {path.relative_to(ROOT).as_posix(): path for folder in (".", "dev", "dev/*", "dev/*/*")
         for path in ROOT.glob(f"{folder}/*.py") if "test" not in path.relative_to(ROOT).parts}
TREES = {name: ast.parse(path.read_text(), name) for name, path in sorted(FILES.items())}
MODULES = {path.stem for path in FILES.values()} | {path.name for path in (ROOT / "dev").iterdir() if path.is_dir()}
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
    return any(text.split(".")[-1] in ("kernel", "inner", "exact") or "cache=True" in text or text.startswith("cached(")
               for text in decorators(function))


def words(tree):
    """Every name, attribute, argument and string in a piece of code"""
    for node in ast.walk(tree):
        yield from (getattr(node, field) for field in ("id", "attr", "arg", "value")
                    if isinstance(getattr(node, field, None), str))


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


def one_name(name, tree):
    """Every module of the project is imported by one name, which begins at the top: dev.data.text, not text."""
    for line, module in imports(tree):
        first = module.split(".")[0]
        if first == "" or first in MODULES - OURS - set(sys.stdlib_module_names) - {"cuda"}:
            yield line, f"imports {module}"


def few_requirements(name, tree):
    """On a CPU the trainer and dev/data/ need four packages: what others need is imported where it is used."""
    if name == "train_gpt2.py" or name.startswith(("dev/run/", "dev/data/")):
        for line, module in imports(tree, everywhere=False):
            if module.split(".")[0] not in REQUIREMENTS | OURS | set(sys.stdlib_module_names):
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


def own_file(name, tree):
    """A kernel that is cached calls nothing from our other files: Numba would not notice that they change."""
    foreign = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or node.names[0].name
            if module.split(".")[0] in OURS:
                foreign |= {alias.asname or alias.name.split(".")[0]: module for alias in node.names}
    for function in filter(is_cached, functions(tree)):
        for node in (node for statement in function.body for node in ast.walk(statement)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] in foreign:
                yield node.lineno, f"{function.name} calls {ast.unparse(node.func)}()"


def no_globals(name, tree):
    """No function assigns to a module's globals, but for what a pool's process in dev/data/ keeps for its calls."""
    for node in () if name.startswith("dev/data/") else ast.walk(tree):
        changed = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value)
        if isinstance(node, ast.Global) or changed and changed.startswith(("globals(", "vars(")):
            yield node.lineno, ast.unparse(node)


def no_setting(name, tree):
    """Only an engine sets its attributes: all others call it."""
    for node in ast.walk(tree):
        is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if is_set and ast.unparse(node.value).split(".")[-1] in ("engine", "model"):
            yield node.lineno, f"sets {ast.unparse(node)}"


def no_module_is_changed(name, tree):
    """No attribute of another module is set, but for the SETTINGS that others have: a module is what its file says."""
    modules = {alias.asname or alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
               for alias in node.names}
    modules |= {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                for alias in node.names if is_module(node.module, alias.name)}
    for node in ast.walk(tree):
        is_set = isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)
        called = isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in ("setattr", "delattr")
        changed = node.value if is_set else node.args[0] if called else None
        foreign = changed is not None and ast.unparse(changed).split(".")[0] in modules
        if foreign and (name, ast.unparse(node)) not in SETTINGS:
            yield node.lineno, ast.unparse(node)


def is_module(package, name):
    """Is what `from package import name` gives a module of ours?"""
    place = ROOT.joinpath(*(package or "").split("."), name)
    return place.is_dir() or place.with_suffix(".py").is_file()


def formats_at_home(name, tree):
    """Files' magic numbers stand in dev/run/files.py alone, and in the PyTorch reference that ours are checked by."""
    if name not in ("dev/run/files.py", "dev/train_gpt2_torch.py"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in FORMATS:
                yield node.lineno, f"says {node.value}"


def one_writer(name, tree):
    """Files are written by dev/run/files.py, which spares devices and follows no link of a stranger's; but for a run's
    log, parts of downloads, and the figures of benchmarks."""
    own = "dev/run/files.py", "dev/run/folder.py", "dev/data/download.py", "dev/bench.py", "dev/bench_gpu.py"
    for node in ast.walk(tree) if name not in own else ():
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).split(".")[-1]
            given = [*node.args[:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
            modes = [x.value for x in given if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            to_write = called == "open" and any(re.fullmatch(r"[wax][bt+]*|rb?\+b?", mode) for mode in modes)
            if to_write or called in ("write_text", "write_bytes", "tofile"):
                yield node.lineno, ast.unparse(node)


def one_loop(name, tree):
    """train() has at most 80 lines, and does not ask which engine, precision or process it runs on."""
    for train in (function for function in functions(tree) if name == "train_gpt2.py" and function.name == "train"):
        lines = train.end_lineno - train.lineno + 1
        if lines > 80:
            yield train.lineno, f"has {lines} lines"
        for node in ast.walk(train):
            asked = set(words(getattr(node, "test", ast.Pass())))
            if asked & {"device", "precision", "rank", "size", "cuda", "bf16"}:
                yield node.lineno, f"asks: {ast.unparse(node.test)}"


def one_page(name, tree):
    """train_gpt2.py has at most 1,500 lines."""
    if name == "train_gpt2.py":
        lines = len(FILES[name].read_text().splitlines())
        if lines > 1500:
            yield lines, f"is the number of its last line: {lines}"


@pytest.mark.parametrize("rule", [
    one_way, one_name, few_requirements, no_gpu_in_the_program, short_kernels, own_file, no_globals, no_setting,
    no_module_is_changed, formats_at_home, one_writer, one_loop, one_page,
])
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
    (one_name, "dev/eval/mmlu.py", "from data.data_common import run"), (one_name, "dev/bench.py", "import generate"),
    (one_name, "dev/eval/mmlu.py", "from . import export_hf"), (one_name, "dev/run/report.py", "from .files import f"),
    (few_requirements, "dev/run/mpi.py", "import os, mpi4py"), (few_requirements, "dev/data/text.py", "import pyarrow"),
    (few_requirements, "train_gpt2.py", "class A:\n    import tqdm"),
    (no_gpu_in_the_program, "train_gpt2.py", "def f():\n    from numba import cuda"),
    (no_gpu_in_the_program, "dev/run/machine.py", "def f():\n    import torch.cuda"),
    (short_kernels, "train_gpt2.py", f"@kernel\ndef f():{LONG[:41 * 9]}"),
    (short_kernels, "dev/engine/cuda_kernels.py", f"@cuda.jit(fastmath=True)\ndef f():{LONG[:41 * 9]}"),
    (own_file, "dev/cpu/gelu.py", "import train_gpt2 as t\n@t.kernel\ndef f(x):\n    return t.exp(x)"),
    (own_file, "dev/engine/cpu.py", "from dev.run.files import f\n@njit(cache=True)\ndef g(x):\n    return f(x)"),
    (no_globals, "dev/run/text.py", "def f():\n    global x\n    x = 1"),
    (no_globals, "dev/bench.py", "globals()['x'] = 1"),
    (no_setting, "dev/run/text.py", "model.cached, x = 0, 1"), (no_setting, "train_gpt2.py", "run.engine.step += 1"),
    (no_module_is_changed, "dev/bench.py", "import train_gpt2 as t\ndef f(x):\n    t.matmul_forward = x"),
    (no_module_is_changed, "dev/bench.py", "import train_gpt2\ntrain_gpt2.config.x += 1"),
    (no_module_is_changed, "train_gpt2.py", "from dev.run import files\nfiles.MAGIC, x = 1, 2"),
    (no_module_is_changed, "train_gpt2.py", "import sys\nsys.excepthook = None"),
    (no_module_is_changed, "train_gpt2.py", "import numba\nsetattr(numba.config, 'THREADS', 3)"),
    (formats_at_home, "dev/data/text.py", "MAGIC = 20240520"),
    (one_writer, "dev/data/text.py", "open(path, 'wb')"), (one_writer, "dev/eval/mmlu.py", "path.open(mode='a')"),
    (one_writer, "dev/generate.py", "Path(name).write_text('x')"), (one_writer, "dev/vislog.py", "open(path, 'r+b')"),
    (one_loop, "train_gpt2.py", "def train(flags):\n    x = 1 if flags.precision == 'bf16' else 2"),
    (one_loop, "train_gpt2.py", "def train(flags):\n    if processes.rank == 0:\n        print()"),
    (one_loop, "train_gpt2.py", f"def train(flags):{LONG}"),
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


def can_fail(function, checks):
    """Is there an assert in a function, raises(), NumPy's assert_allclose() and the like, or one of checks?"""
    calls = {ast.unparse(node.func).split(".")[-1] for node in ast.walk(function) if isinstance(node, ast.Call)}
    checked = calls & {"raises", *checks} or any(call.startswith("assert_") for call in calls)
    return checked or any(isinstance(node, ast.Assert) for node in ast.walk(function))


def without_checks(trees):
    """The tests without a check of their own or of a function that they call, however deep, in any of the trees"""
    found, checks, before = [f for tree in trees for f in functions(tree)], set(), None
    while checks != before:
        before, checks = checks, {f.name for f in found if can_fail(f, checks)}
    return [f.name for f in found if f.name.startswith("test_") and not can_fail(f, checks)]


def test_every_test_can_fail():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "dev/test").glob("*.py")]
    assert without_checks(trees) == []
    useless = "def help():\n    pass\ndef test_it():\n    help()"
    assert without_checks([ast.parse(useless)]) == ["test_it"]
    assert not without_checks([ast.parse(useless.replace("pass", "assert 1"))])


def test_what_the_trainer_loads(python):
    """Neither a GPU's packages nor MPI's, nor other engines: importing train_gpt2 needs NumPy and Numba."""
    out, err = python("-c", LOADED).communicate()
    loaded = set(out.split())
    assert {"train_gpt2", "numba", "numpy", "dev.run.flags"} <= loaded, err
    assert not {name for name in loaded if name.split(".")[0] in ("mpi4py", "torch", "cupy", "cuda", "nvidia")}
    assert not {name for name in loaded if name.startswith(("dev.", "numba.cuda")) and not name.startswith("dev.run")}
