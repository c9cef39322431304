"""
What surrounds a run and knows no kernel; a part of the program.

Where one of the packages that it needs is missing, importing it says so in one line.
"""
import importlib.util
import sys

MISSING = [name for name in ("numpy", "numba", "tiktoken", "requests") if importlib.util.find_spec(name) is None]
if MISSING:
    raise SystemExit(f"error: {sys.executable} has no package {', '.join(MISSING)}\n---> HINT: `make train` or `python "
                     "dev/start.py` makes .venv, which has them: source .venv/bin/activate (Windows: "
                     ".venv\\Scripts\\activate); or: python -m pip install -r requirements.txt")
