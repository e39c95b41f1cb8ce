import io

from lamina_jax.engine.progress import LINE_INTERVAL, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_lines_where_there_is_no_terminal():
    file, clock = io.StringIO(), Clock()
    with Progress(3, file=file, clock=clock) as progress:
        clock.now += LINE_INTERVAL / 2
        progress.add(prompt_tokens=100)
        assert file.getvalue() == ""
        clock.now += LINE_INTERVAL / 2
        progress.add(finished=1, decode_tokens=5)
        assert file.getvalue() == "Requests: 1/3, prompt 10.0 tok/s, decode 0.5 tok/s\n"
        clock.now += LINE_INTERVAL - 1
        progress.add(finished=2, decode_tokens=14)
    assert file.getvalue().splitlines()[1:] == ["Requests: 3/3, prompt 5.3 tok/s, decode 1.0 tok/s"]
    assert "\r" not in file.getvalue()


def test_a_bar_on_a_terminal():
    file, clock = Terminal(), Clock()
    with Progress(2, file=file, clock=clock) as progress:
        clock.now += 2
        progress.add(finished=1, prompt_tokens=10)
        progress.add(finished=1, decode_tokens=4)
    last = file.getvalue().rstrip().split("\r")[-1]
    assert "2/2" in last
    assert "prompt 5.0 tok/s, decode 2.0 tok/s" in last


def test_an_unknown_total():
    file = io.StringIO()
    with Progress(file=file, clock=Clock()) as progress:
        progress.add(finished=4)
    assert file.getvalue().startswith("Requests: 4, ")


def test_off():
    for file in (Terminal(), io.StringIO()):
        with Progress(2, use_tqdm=False, file=file) as progress:
            progress.add(finished=2, decode_tokens=1)
        assert file.getvalue() == ""


def test_closing_twice_prints_once():
    file = io.StringIO()
    with Progress(1, file=file) as progress:
        progress.close()
    assert file.getvalue().count("\n") == 1


def test_stderr_is_looked_up_late(capsys):
    with Progress(1):
        pass
    assert capsys.readouterr().err.startswith("Requests: 0/1")
