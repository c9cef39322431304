"""
Every script runs by its path from any folder and by -m, whatever else on the path is called like something of ours, and
has each of our modules once, under one name.
"""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [ROOT / "train_gpt2.py"] + sorted(
    path for path in (ROOT / "dev").rglob("*.py")
    if path.parent.name != "test" and 'if __name__ == "__main__":' in path.read_text())
NEEDS = {"train_gpt2_torch": "torch"}  # before it can say what its flags are

# Python imports this at its start; when a script ends, it looks at what the script has imported, and from where.
WITNESS = f'''
import atexit, os, sys

dev = {str(ROOT / "dev")!r}

def look():
    problems = [f"{{path}} is on the path" for path in sys.path if os.path.realpath(path).startswith(dev)]
    seen = {{}}
    for name, module in list(sys.modules.items()):
        file = os.path.relpath(os.path.realpath(getattr(module, "__file__", None) or "/"), os.path.dirname(dev))
        if file.split(os.sep)[0] not in ("dev", "train_gpt2.py"):
            continue
        expected = file.removesuffix(".py").replace(os.sep, ".").removesuffix(".__init__")
        wrong = name != expected and module is not sys.modules["__main__"]  # which has a second name in multiprocessing
        if wrong or seen.setdefault(file, module) is not module:
            problems.append(f"{{file}} is imported as {{name}}")
    if problems:
        print(*problems, sep="\\n", file=sys.stderr, flush=True)
        os._exit(9)

atexit.register(look)
'''


@pytest.fixture
def decoys(tmp_path):
    """A folder in which `dev`, `data` and a file that we never meant are waiting to be imported"""
    for name in "dev", "dev/data", "dev/run", "data":
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('error: this is another {name}')")
    (tmp_path / "sitecustomize.py").write_text(WITNESS)
    return str(tmp_path)


def test_there_are_scripts():
    names = {str(path.relative_to(ROOT)) for path in SCRIPTS}
    assert {"dev/bench.py", "dev/data/text.py", "dev/eval/mmlu.py", "dev/doc/plot_bench.py"} <= names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_both_ways(script, decoys, tmp_path):
    if script.stem in NEEDS and not importlib.util.find_spec(NEEDS[script.stem]):
        pytest.skip(f"needs {NEEDS[script.stem]}: pip install -r dev/requirements.txt")
    (tmp_path / "elsewhere").mkdir()
    module = ".".join(script.relative_to(ROOT).with_suffix("").parts)
    started = [
        subprocess.Popen([sys.executable, *way, "--help"], cwd=tmp_path / "elsewhere", text=True,
                         env={**os.environ, "PYTHONPATH": path, "COLUMNS": "999"},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for way, path in (([str(script)], decoys), (["-m", module], f"{ROOT}{os.pathsep}{decoys}"))]
    (by_path, errors), (by_name, more_errors) = (process.communicate(timeout=300) for process in started)
    assert (errors, more_errors) == ("", "") and [process.returncode for process in started] == [0, 0]
    assert by_path.startswith("usage: ") and by_path.partition("[-h]")[2] == by_name.partition("[-h]")[2]
