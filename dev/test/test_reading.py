"""Reading what others have made: JSON of every wrong kind, pipes and devices, texts that would pass for our lines."""
import json
import os

import pytest

from dev.run import console, files, reading

SHAPE = {"steps": int, "loss": float, "windows": [[float]], "pair": [int, str], "tree?": {str: (str, None)}}
GOOD = {"steps": 3, "loss": 2, "windows": [[1.5], []], "pair": [1, "a"], "more": [[]]}


@pytest.fixture
def written(tmp_path):
    """written(text or bytes): the path of a file that holds it"""
    def written(content):
        (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / "a.json"
    return written


@pytest.mark.parametrize("change", [{}, {"tree": {}}, {"tree": {"x": None, "y": "z"}}, {"loss": -1e300}])
def test_what_fits(written, change):
    assert reading.read_json(written(json.dumps(GOOD | change)), SHAPE) == GOOD | change


@pytest.mark.parametrize("change, words", [
    ({"steps": True}, "steps is true, expected a whole number"), ({"steps": "3"}, 'steps is "3"'),
    ({"loss": 10**400}, "loss is 1000000"), ({"loss": float("nan")}, "loss is NaN, expected a finite number"),
    ({"windows": [[1], [0, {}]]}, "windows[1][1] is names and values (0), expected a finite number"),
    ({"pair": [1]}, "pair has 1 values, expected 2"), ({"pair": 7}, "pair is 7, expected a list"),
    ({"tree": {"x\n---> HINT: y": 1}}, "tree x\\n---> HINT: y is 1, expected a text or nothing"),
])
def test_what_does_not_fit(written, change, words):
    path = written(json.dumps(GOOD | change))
    with pytest.raises(ValueError) as caught:
        reading.read_json(path, SHAPE)
    first, hint = str(caught.value).split("\n")
    assert first.startswith(f"{path}: ") and words in first and hint.startswith("---> HINT: ")


@pytest.mark.parametrize("content, words", [
    ("", "not JSON"), ("{", "not JSON"), ("[]", "a list .0., expected names and values"), (b"\xff{}", "not UTF-8"),
    ("[" * 100_000 + "]" * 100_000, "nested too deeply"), ('{"a":' * 900 + "1" + "}" * 900, "more than 64 levels"),
    ('{"a": ' + "9" * 5000 + "}", "not JSON"), ("{}" + " " * 100, "too many"), ('{"a": 1} x', "not JSON"),
])
def test_what_is_no_json(written, monkeypatch, content, words):
    monkeypatch.setattr(reading, "LARGEST_JSON", 100 if words == "too many" else 1 << 20)
    with pytest.raises(ValueError, match=words) as caught:
        reading.read_json(written(content))
    assert str(caught.value).count("\n") == 1


def test_names_that_come_twice():
    assert reading.parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="twice"):
        reading.parse_json('[{"a": 1, "a": 2}]', list, unique=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Unix only")
def test_pipes_devices_and_folders_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), ("/dev/zero", "device"), (tmp_path, "folder")):
        with pytest.raises(ValueError, match=f"is a {kind}, expected a file"):
            reading.read_json(path)
        with pytest.raises(ValueError, match=kind):
            files.open_file(path)


@pytest.mark.parametrize("error, line", [
    (ValueError("a.bin: x\n---> HINT: y\n---> HINT: z"), "error: a.bin: x\n---> HINT: y\n---> HINT: z"),
    (MemoryError(), "error: not enough memory"), (OSError(), "error: OSError"),
    (RecursionError("maximum"), "error: something is nested too deeply"),
    (ValueError("a\nerror: b\x1b[31m\u202e"), "error: a\\nerror: b\\x1b[31m\\u202e"),
])
def test_every_error_is_one_line(capsys, error, line):
    def main():
        raise error
    assert console.program(main) == 1
    out, err = capsys.readouterr()
    assert (out, err[:len(line)]) == ("", line) and err.count("\n") == 1 + line.count("\n")


def test_the_status_of_a_program(capsys):
    assert [console.program(lambda value: value, value) for value in (None, 0, 3)] == [0, 0, 3]

    def stopped():
        raise KeyboardInterrupt
    assert console.program(stopped) == 1 and "interrupted" in capsys.readouterr().err


def test_what_is_printed_cannot_steer_a_terminal(capsys):
    console.say("\x1b[2J\r\x85\u2028tab\tline\nΩ漢\u3000", "\udcff")
    assert capsys.readouterr().out == "\\x1b[2J\\r\\x85\\u2028tab\tline\nΩ漢\u3000 \\udcff\n"
    assert console.shown("a\nb" + "c" * 1000).startswith("a\\nbc") and len(console.shown("c" * 1000)) < 410


def test_what_goes_wrong_names_the_file():
    for error in MemoryError(), KeyError("x"), OverflowError("too big"), OSError(5, "Input/output error"):
        with pytest.raises(ValueError, match=r"^a\.bin: .+\n---> HINT: ") as caught, reading.reading("a.bin"):
            raise error
        assert str(caught.value).count("\n") == 1
