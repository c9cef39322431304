"""Plots of main.log: what is read from a log, and pictures of whatever runs there are."""
import itertools
import re

import pytest

from dev import vislog

LOG = """s:0 tel:5.5000
s:0 trl:5.6000 lr:0.000300 norm:3.10
s:1 trl:5.4000 lr:0.000600 norm:2.90
s:2 tel:5.2500
s:2 eval:0.2600
"""


@pytest.fixture
def write_run(tmp_path):
    """write_run(name, text): the folder of a run with this log"""
    def write_run(name, text=LOG):
        (tmp_path / name).mkdir()
        (tmp_path / name / "main.log").write_text(text)
        return tmp_path / name
    return write_run


def read(write_run, text):
    streams, malformed = vislog.read_log(write_run("run", text) / "main.log")
    return dict(streams), malformed


def test_log(write_run):
    assert read(write_run, LOG) == ({"tel": {0: 5.5, 2: 5.25}, "trl": {0: 5.6, 1: 5.4}, "lr": {0: 3e-4, 1: 6e-4},
                                     "norm": {0: 3.1, 1: 2.9}, "eval": {2: 0.26}}, 0)


@pytest.mark.parametrize("line", ["", "s:", "s:3", "s:3 trl:", "s:3 trl:abc", "s:3 trl:nan lr:1", "s:3 trl:4.0 lr",
                                  "x:3 trl:4", "s:-3 trl:4", "s:3 trl:4:5", "\0\0\0"])
def test_malformed_lines_are_counted(write_run, line):
    assert read(write_run, f"s:1 trl:4\n{line}\ns:5 trl:3\n") == ({"trl": {1: 4, 5: 3}}, 1)


def test_a_step_that_was_done_twice(write_run):
    assert read(write_run, "s:1 trl:4\ns:2 trl:3\ns:1 trl:5\n") == ({"trl": {1: 5, 2: 3}}, 0)


def test_smoothed():
    assert vislog.smoothed([1, 2, 3, 4], 0) == vislog.smoothed([1, 2, 3, 4], 1) == [1, 2, 3, 4]
    assert vislog.smoothed([3, 0, 9, 3, 6], 3) == [3, 4, 4, 6, 4.5]
    assert vislog.smoothed(list(range(20)), 7) == pytest.approx([*range(17), 16.5, 17, 17.5])
    assert vislog.smoothed([7], 50) == [7]


def test_labels_are_spread():
    assert vislog.spread([], 1) == [] and vislog.spread([5, 1, 3], 1) == [5, 1, 3]
    assert vislog.spread([1, 1, 1], 1) == pytest.approx([0, 1, 2])
    assert vislog.spread([0, 10.2, 10], 1) == pytest.approx([0, 10.6, 9.6])
    places = sorted(vislog.spread([0.5, 0.52, 0.9, 0.55, 0.1, 0.12], 0.1))
    assert all(b - a > 0.0999 for a, b in itertools.pairwise(places))


def test_names_of_runs(write_run, tmp_path):
    run = write_run("a")
    log = run / "main.log"
    assert vislog.find_runs([run, f"b={run}", log]) == [("a", log), ("b", log), ("a", log)]
    (tmp_path / "other.txt").touch()
    assert vislog.find_runs([str(tmp_path / "other.txt")]) == [("other", tmp_path / "other.txt")]


@pytest.mark.parametrize("suffix, begins", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_picture(write_run, tmp_path, capsys, suffix, begins):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"runs.{suffix}"
    runs = [write_run("a"), write_run("b", LOG.replace("eval", "x") + "s:3 tr"), write_run("c", "s:0 trl:3.0\n"),
            write_run("d", "s:0 tel:3.1\n")]
    flags = ["--smooth", "3", "--loss_min", "2.5", "--loss_max", "7", "--title", "Runs"]
    assert vislog.main([*map(str, runs), "-o", str(picture), *flags]) == 0
    assert picture.read_bytes().startswith(begins) and "1 malformed line skipped" in capsys.readouterr().out
    assert vislog.main([str(runs[2]), "-o", str(picture)]) == 0


def test_text_of_a_picture(write_run, tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text as text
    steps = "".join(f"s:{s} trl:{4 - s / 100:.4f} lr:0.000600 norm:1.00\n" for s in range(100))
    run = write_run("my_run", steps + "s:100 tel:3.1\n")
    vislog.main([str(run), "-o", str(tmp_path / "run.svg")])
    text = (tmp_path / "run.svg").read_text()
    assert all(word in text for word in ("my_run", "val 3.100", "train 3.015", "Learning rate"))
    assert "GPT-2" not in text and "HellaSwag" not in text
    vislog.main([str(run), "-o", str(tmp_path / "run.svg"), "--gpt2"])
    text = (tmp_path / "run.svg").read_text()
    assert "GPT-2 124M" in text and "GPT-2 350M" in text and "GPT-2 1558M" not in text


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_a_picture_is_full(write_run, monkeypatch, names):
    """The axes have four fifths of its width, and more where there is one run."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: figures.append(figure))
    vislog.plot([(name, vislog.read_log(write_run(name) / "main.log")[0]) for name in names], "png")
    widths = [axes.get_position().width for axes in figures[0].axes]
    assert min(widths) > (0.9 if len(names) == 1 else 0.8)


def test_table(write_run, tmp_path):
    runs = [str(write_run("a")), str(write_run("b", "s:7 trl:3.0 lr:0.1 norm:1.0\n"))]
    assert vislog.main([*runs, "-o", str(tmp_path / "runs.csv")]) == 0
    assert (tmp_path / "runs.csv").read_text().splitlines() == [
        "run,step,train_loss,val_loss,learning_rate,grad_norm,hellaswag", "a,0,5.6,5.5,0.0003,3.1,",
        "a,1,5.4,,0.0006,2.9,", "a,2,,5.25,,,0.26", "b,7,3.0,,0.1,1.0,"]


def test_watch(write_run, tmp_path, monkeypatch):
    """The page is written when the log has grown, and rests after Ctrl-C."""
    pytest.importorskip("matplotlib")
    run, path, pages = write_run("<a>"), tmp_path / "run.html", []

    def sleep(seconds):
        pages.append(path.read_text())
        if len(pages) == 3:
            raise KeyboardInterrupt
        if len(pages) == 2:
            with open(run / "main.log", "a") as log:
                log.write("s:3 tel:1.2345\n")
    monkeypatch.setattr(vislog.time, "sleep", sleep)
    assert vislog.main([str(run), "-o", str(path), "--watch", "3"]) == 0
    assert pages[0] == pages[1] != pages[2] and 'http-equiv="refresh" content="3"' in pages[2]
    assert "http-equiv" not in path.read_text() and "<title>&lt;a&gt;</title>" in path.read_text()
    assert not re.search(r"(src|href)=.(?!#)", re.sub(r"xlink:href=.#", "", path.read_text()))  # no other file


@pytest.mark.parametrize("more", [["-o", "run.png", "--watch"], ["-o", "run.html", "--watch", "0"]])
def test_what_cannot_be_watched(write_run, more, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert vislog.main([str(write_run("a")), *more]) == 1
    assert re.fullmatch(r"error: .*\n---> HINT: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("flag", ["--smooth", "--loss_min", "--loss_max"])
@pytest.mark.parametrize("value", ["-5", "0", "nan", "-inf"])
def test_flags_that_make_no_picture(write_run, tmp_path, capsys, flag, value):
    if flag == "--smooth" and value in ("nan", "-inf"):
        with pytest.raises(SystemExit):
            vislog.main([str(write_run("run")), "--smooth", value])
    elif flag == "--smooth" or value in ("nan", "-inf"):
        assert vislog.main([str(write_run("run")), "-o", str(tmp_path / "run.png"), f"{flag}={value}"]) == 1
        assert re.fullmatch(r"error: .*\n---> HINT: .*\n", capsys.readouterr().err)
        assert not (tmp_path / "run.png").exists()


@pytest.mark.parametrize("text", [None, "", "nothing\n", "s:1 lr:3\n"])
def test_logs_without_steps(write_run, tmp_path, capsys, text):
    run = write_run("run", text) if text is not None else tmp_path / "missing"
    assert vislog.main([str(run), "-o", str(tmp_path / "run.png")]) == 1
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "run.png").exists()


def test_a_line_to_compare_with(write_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = str(write_run("run"))
    for more in [], ["--line", "published=5.3", "--line", "a=b=5.4"]:
        assert vislog.main([run, "-o", str(tmp_path / f"{len(more)}.svg"), *more]) == 0
    pictures = [(tmp_path / f"{n}.svg").read_text() for n in (0, 4)]
    assert ["<!-- published: 5.3 -->" in picture for picture in pictures] == [False, True]
    assert "<!-- a=b: 5.4 -->" in pictures[1]
    for wrong in "5.3", "=5.3", "published=", "published=nan", "published=1e40":
        with pytest.raises(SystemExit):
            vislog.main([run, "--line", wrong])
        assert f"NAME=LOSS is expected, such as published=1.88, not {wrong}" in capsys.readouterr().err
