import io
import re
import sys

from stepquant.compute.progress import meter, track


def test_a_log_gets_one_line_per_item(capsys):
    assert list(track(["a", "b", "c"], "capture@low_noise")) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"capture@low_noise: {i}/3" for i in (1, 2, 3)]
    assert all(re.fullmatch(r".*: \d/3, \d+\.\d\d s each, \d+ s left", line) for line in lines)
    assert lines[-1].endswith(", 0 s left")


def test_an_item_is_reported_once_it_is_done(capsys):
    items = track([1, 2], "x")
    next(items)
    assert capsys.readouterr().err == ""
    next(items)
    assert capsys.readouterr().err.startswith("x: 1/2, ")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(track(range(3), "gptq")) == [0, 1, 2]
    assert "gptq" in terminal.getvalue() and "3/3" in terminal.getvalue()
    assert "s each" not in terminal.getvalue()


def test_no_items_no_lines(capsys):
    assert list(track([], "x")) == []
    assert capsys.readouterr().err == ""


def test_what_was_finished_earlier_counts_but_takes_no_time(monkeypatch, capsys):
    now = iter([0.0, 8.0, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with meter("clip", 5) as progress:
        progress.skip(2)
        progress.step()
        progress.extend(1)
        progress.step()
    assert capsys.readouterr().err.splitlines() == [
        "clip: 2/5, finished earlier",
        "clip: 3/5, 8.00 s each, 16 s left",
        "clip: 4/6, 6.00 s each, 12 s left",
    ]


def test_a_bar_leaves_out_what_was_finished_earlier(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with meter("clip", 5) as progress:
        progress.skip(3)
        for _ in range(2):
            progress.step()
    assert "2/2" in terminal.getvalue()
