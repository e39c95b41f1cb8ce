"""Checks in machines: each within its time, and none hides another."""

import contextlib
import dataclasses
import re
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from lamina_jax.testing.rdma import runner
from lamina_jax.testing.rdma.image import Image
from lamina_jax.testing.rdma.machines import MachineError
from lamina_jax.testing.rdma.programs import run_here
from lamina_jax.testing.rdma.report import Row, failed, judged, passed, summary, table
from lamina_jax.testing.rdma.runner import Check, Runner

IMAGE = Image(kernel=Path("no"), initramfs=Path("no"), modules=Path("no"))
LEAVES = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"


def good(machines):
    yield passed("first", machines[0].run(["echo", "hello"], timeout_s=60.0).strip())
    yield judged("second", len(machines) == 2, f"{len(machines)} machines")


def hangs(machines):
    machines[0].start(["sleep", "1000"])
    while True:
        time.sleep(0.01)
    yield


def fails(machines):
    yield passed("so far")
    machines[0].run(["bash", "-c", "echo what is wrong; exit 7"], timeout_s=60.0)


def leaves(machines):
    machines[0].run([sys.executable, "-c", LEAVES], timeout_s=60.0)
    yield passed("leaves")


def cuts(machines):
    machines[0].cut_power()
    yield passed("cuts")


def finds_nothing(machines):
    yield from ()


def interrupted(machines):
    raise KeyboardInterrupt
    yield


def check(run, num_machines=1, limit_s=60.0) -> Check:
    return Check(name=run.__name__, run=run, num_machines=num_machines, limit_s=limit_s)


@pytest.fixture
def boots(make_machine, monkeypatch) -> list:
    """Makes machines processes of this one. The list of all boots."""
    booted = []

    @contextlib.contextmanager
    def machines(count, **_options):
        made = tuple(make_machine(f"{name}{len(booted)}") for name in ("a", "b")[:count])
        booted.append(made)
        for machine in made:
            machine.wait_until_ready()
        try:
            yield made
        finally:
            for machine in made:
                machine.close()

    monkeypatch.setattr(runner, "machines", machines)
    return booted


def run(checks, tmp_path, limit_s=300.0) -> list[Row]:
    shown: list[Row] = []
    runner = Runner(image=IMAGE, folder=tmp_path, limit_s=limit_s, show=shown.append)
    runner.run(checks)
    assert shown == runner.rows
    return shown


def test_one_boot_for_all_checks_with_as_many_machines_as_any_needs(boots, tmp_path):
    rows = run([check(good, num_machines=2), check(good), check(good, num_machines=2)], tmp_path)
    assert [len(machines) for machines in boots] == [2]
    assert [(row.name, row.outcome, row.detail) for row in rows] == [
        ("boot 1: 2 machines", "passed", ""),
        *[("first", "passed", "hello"), ("second", "passed", "2 machines")] * 3,
    ]
    assert not any(machine.alive for machines in boots for machine in machines)


def test_a_check_is_prepared_before_it_begins_and_run_even_if_that_fails(boots, tmp_path):
    def prepare(folder):
        assert folder.is_relative_to(tmp_path)
        (folder / "prepared").touch()

    def refuse(folder):
        raise ValueError(f"nothing works in {folder.name}")

    def looks(machines):
        (path,) = tmp_path.glob("*/prepared")
        yield passed("looks", path.parent.name)

    refused = dataclasses.replace(check(good), prepare=refuse)
    rows = run([refused, dataclasses.replace(check(looks), prepare=prepare)], tmp_path)
    assert [(row.name, row.outcome, row.detail) for row in rows] == [
        ("boot 1: 1 machine", "passed", ""),
        ("good, prepared here", "FAILED", "ValueError: nothing works in boot-1"),
        ("first", "passed", "hello"),
        ("second", "FAILED", "1 machines"),
        ("looks", "passed", "boot-1"),
    ]
    assert len(boots) == 1


def test_time_that_is_up_while_a_check_is_prepared(boots, tmp_path):
    is_over = threading.Event()

    def prepare(folder):
        is_over.wait(60.0)

    def ends(machines):
        is_over.set()
        yield passed("ends")

    slow = dataclasses.replace(check(good, limit_s=1.0), prepare=prepare)
    start = time.monotonic()
    rows = run([slow, check(ends)], tmp_path)
    assert [(row.name, row.outcome) for row in rows[1:]] == [("good", "FAILED"), ("ends", "passed")]
    assert rows[1].detail == "its time was up after 1 s"
    assert len(boots) == 1
    assert time.monotonic() - start < 30.0


@pytest.mark.usefixtures("boots")
def test_what_prepares_a_check_ends_with_all_others(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(1000)"]

    def prepare(folder):
        run_here(command, folder=folder, cwd=folder, timeout_s=900.0)

    slow = dataclasses.replace(check(good, limit_s=1.0), prepare=prepare)
    start = time.monotonic()
    rows = run([slow, dataclasses.replace(check(interrupted), limit_s=1.0, prepare=prepare)], tmp_path)
    assert [row.detail for row in rows[1:]] == ["its time was up after 1 s"] * 2
    assert time.monotonic() - start < 30.0
    assert not any(child.cmdline() == command for child in psutil.Process().children(recursive=True))


def test_neither_a_failure_nor_a_hang_hides_the_checks_behind_it(boots, tmp_path):
    rows = run([check(fails), check(hangs, limit_s=1.0), check(finds_nothing), check(good)], tmp_path)
    assert len(boots) == 1
    assert [(row.name, row.outcome) for row in rows[1:]] == [
        ("so far", "passed"),
        ("fails", "FAILED"),
        ("hangs", "FAILED"),
        ("finds_nothing", "FAILED"),
        ("first", "passed"),
        ("second", "FAILED"),
    ]
    assert "JobError: bash on machine a0 ended with status 7\nwhat is wrong" in rows[2].detail
    assert rows[3].detail == "its time was up after 1 s"


def test_what_a_check_leaves_behind_is_a_failure_of_its_own(boots, tmp_path):
    rows = run([check(leaves), check(good)], tmp_path)
    assert (rows[2].outcome, rows[2].detail) == ("FAILED", "left behind on machine a0: sleep 1000")
    assert (rows[3].name, rows[3].outcome) == ("first", "passed")


def test_machines_that_are_gone_are_booted_again(boots, tmp_path):
    rows = run([check(cuts), check(good)], tmp_path)
    assert [row.name for row in rows] == ["boot 1: 1 machine", "cuts", "boot 2: 1 machine", "first", "second"]


def test_a_boot_that_fails_costs_each_check_a_row_and_no_more(monkeypatch, tmp_path):
    def no_machines(*_arguments, **_options):
        raise MachineError("machine a ended while booting")

    monkeypatch.setattr(runner, "machines", no_machines)
    rows = run([check(good), check(fails)], tmp_path)
    assert [(row.name, row.outcome) for row in rows] == [
        ("boot 1: 1 machine", "FAILED"),
        ("good", "FAILED"),
        ("boot 2: 1 machine", "FAILED"),
        ("fails", "FAILED"),
    ]


@pytest.mark.usefixtures("boots")
def test_no_check_begins_when_the_time_of_all_is_up(tmp_path):
    rows = run([check(good)], tmp_path, limit_s=0.0)
    assert (rows[1].outcome, rows[1].detail) == ("FAILED", "not begun: the 0 s of all checks were up")


def test_an_interruption_ends_the_machines(boots, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run([check(interrupted)], tmp_path)
    assert not boots[0][0].alive


def test_table():
    rows = [passed("a", "fine"), failed("a longer name", "first line\nsecond"), passed("long", "x" * 200)]
    assert table(rows).splitlines() == [
        "check          result  seconds  detail",
        "-" * 142,
        "a              passed      0.0  fine",
        "a longer name  FAILED      0.0  first line",
        "long           passed      0.0  " + "x" * 107 + "...",
    ]
    assert summary(rows, 12.3) == "2 passed, 1 failed in 12 s"
    assert re.fullmatch("check +result +seconds +detail\n-+", table([]))
