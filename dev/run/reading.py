"""
Reading files that others have made, and that may be damaged or meant to do harm: what a reader believes it has looked
at before, memory is bounded by the file's size, and what goes wrong is said with the file's name.
"""
import contextlib
import json
import math

from dev.run.console import shown
from dev.run.files import plain_file

LARGEST_JSON = 1 << 27  # bytes; the largest that is of use, a tokenizer.json of 256,000 tokens, has 33 million
DEEPEST_JSON = 64       # brackets inside one another
HINT = "\n---> HINT: "


@contextlib.contextmanager
def reading(path, hint="fetch or write it again"):
    """A context in which what goes wrong with a file's content is a ValueError of one line that begins with its name"""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, OSError, EOFError,
            MemoryError, RuntimeError) as error:
        name, problem = shown(path), reason(error)
        if problem.startswith(name) and "\n" in str(error) or isinstance(error, ValueError) and HINT in str(error):
            raise
        problem = problem.removeprefix(f"{name}: ")
        raise ValueError(f"{name}: {problem}\n---> HINT: {hint}") from None


def reason(error):
    """What an exception says, in one line that is never empty, without its hints"""
    kind = next((words for kind, words in WORDS.items() if isinstance(error, kind)), None)
    text = (getattr(error, "strerror", None) or str(error)).split(HINT)[0]
    return ": ".join(filter(None, [kind, shown(text)])) or type(error).__name__


WORDS = {MemoryError: "not enough memory", RecursionError: "nested too deeply", UnicodeDecodeError: "not UTF-8",
         KeyError: "missing"}


# ---------------------------------------------------------------------------------------------------------------------
# JSON

def read_json(path, shape=dict, hint="fetch or write it again"):
    """What a JSON file says. ValueError, with its name, where it is no JSON, too large, too deep, or has not the shape,
    see misfit(); FileNotFoundError where it is missing."""
    size = plain_file(path)
    with reading(path, hint):
        if size > LARGEST_JSON:
            raise ValueError(f"{size:,} bytes are too many for it, expected at most {LARGEST_JSON:,}")
        with open(path, "rb") as file:
            return parse_json(file.read(size), shape)


def parse_json(text, shape=dict, unique=False):
    """What a JSON text says, of bytes in UTF-8 or of characters; unique: no name comes twice. ValueError otherwise"""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=distinct if unique else None)
    except RecursionError:
        value, problem = None, "nested too deeply"
    except UnicodeDecodeError as error:
        value, problem = None, f"not UTF-8: byte {error.object[error.start]} at {error.start:,}"
    except ValueError as error:
        value, problem = None, f"not JSON: {shown(error)}"
    else:
        deep = deeper_than(value, DEEPEST_JSON)
        problem = f"nested more than {DEEPEST_JSON} levels deep" if deep else misfit(value, shape)
    if problem:
        raise ValueError(problem)
    return value


def distinct(pairs):
    """The pairs of a JSON object as a dictionary. ValueError where a name comes twice"""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def deeper_than(value, most):
    """Has a value of JSON more levels than `most`? Level by level: recursion might not end well."""
    level = [value]
    for _ in range(most + 1):
        level = [child for item in level if isinstance(item, (dict, list))
                 for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return True


def misfit(value, shape, where=""):
    """What is wrong with a value of JSON, in words, or None where it has the shape:

    str bool int dict list  a value of this type, True and False being no int
    float                   a finite number
    (a, b)                  one of these shapes; None is JSON's null
    [a]  [a, b]             a list of a's; a list of two, the first an a, the second a b
    {str: a}                names with values that are a's
    {"x": a, "y?": b}       at least these names; y may be missing
    """
    problem = f"{where or 'it'} is {brief(value)}, expected "
    if shape is None or isinstance(shape, type):
        return None if is_a(value, shape) else problem + ("nothing" if shape is None else NAMES.get(shape, "?"))
    if isinstance(shape, tuple):
        found = [misfit(value, one, where) for one in shape]
        return None if None in found else problem + " or ".join(f.rpartition(", expected ")[2] for f in found)
    if not isinstance(value, type(shape)):
        return problem + NAMES[type(shape)]
    if isinstance(shape, list):
        if len(shape) > 1 and len(value) != len(shape):
            return f"{where or 'it'} has {len(value)} values, expected {len(shape)}"
        parts = ((f"{where}[{i}]", v, shape[min(i, len(shape) - 1)]) for i, v in enumerate(value))
    elif str in shape:
        parts = ((f"{where} {shown(name)}".strip(), v, shape[str]) for name, v in value.items())
    else:
        missing = [name for name in shape if not name.endswith("?") and name not in value]
        if missing:
            return f"{where or 'it'} has no {missing[0]!r}"
        parts = ((f"{where} {name.strip('?')}".strip(), value[name.strip("?")], part)
                 for name, part in shape.items() if name.strip("?") in value)
    return next(filter(None, (misfit(v, part, at) for at, v, part in parts)), None)


NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number", list: "a list",
         dict: "names and values", object: "anything"}


def is_a(value, kind):
    if kind is None:
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value)
    return isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool))


def is_finite(number):
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond all floats
        return False


def brief(value):
    """A value of JSON in few words"""
    if isinstance(value, (dict, list)):
        return f"{'names and values' if isinstance(value, dict) else 'a list'} ({len(value)})"
    return shown(json.dumps(value), 60)
