"""Virtual machines with RDMA devices, and the jobs that run in them.

    with machines(2, folder=folder) as (a, b):
        server = a.start(["ib_write_lat", "-d", DEVICE, "-x", "1", "-F"])
        a.wait_for_port(18515)
        print(b.run(["ib_write_lat", "-d", DEVICE, "-x", "1", "-F", a.address], timeout_s=60.0))
        server.wait(timeout_s=10)

Each is a QEMU without hardware acceleration that runs a stock kernel on this machine's own files, read-only below a
layer of memory: the checkout, its virtual environment and every program lie where they lie here. What a machine writes
is gone with it, but for what it writes to `folder`, which has the same path in all machines and here.
Jobs run as root. Each has the Soft-RoCE devices `DEVICE` on eth0 and `LOOPBACK_DEVICE` on lo. Two machines have an
Ethernet link between their eth0; that of a single one leads nowhere.

A machine waits for its jobs on a serial line, without polling. Nothing outlives the `with`: leaving it, also by Ctrl-C,
hangs up, which powers the machine off; one that does not is killed, as it is when its time is up.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from lamina_jax.testing.rdma import programs, warm_python
from lamina_jax.testing.rdma.image import Image, prepare_image

ROOT: Final = Path(__file__).resolve().parents[3]
"""The checkout; jobs start in it."""
DEVICE: Final = "rxe0"
"""The RDMA device on eth0."""
LOOPBACK_DEVICE: Final = "rxelo"
"""The RDMA device on lo."""
GID_INDEX: Final = 1
"""The RoCE v2 GID of the IPv4 address, on both devices."""
MTU: Final = 4200
"""Bytes of a packet of eth0; leaves room for 4096 of RDMA."""

_AGENT: Final = Path(__file__).with_name("guest_agent.py")
_BOOT_LIMIT_S: Final = 120.0
_WARM_LIMIT_S: Final = 300.0
_GRACE_S: Final = 5.0
_TAIL_LINES: Final = 20
_MOST_PROCESSORS: Final = 1 << 16
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _wait_for_gid(device: str) -> str:
    """Bash: the address appears a moment after the device."""
    gid = f"/sys/class/infiniband/{device}/ports/1/gids/{GID_INDEX}"
    return f"for i in {{1..200}}; do grep -q ffff {gid} && break; sleep 0.05; done; grep -q ffff {gid}"


_LINK_UP: Final = f"ip link set eth0 up\n{_wait_for_gid(DEVICE)}"
_NO_LOSS: Final = "tc qdisc del dev eth0 root 2>/dev/null || true"


def _use_processors(count: int) -> str:
    """Bash: the first so many are online, and no others."""
    return f"""
        for cpu in /sys/devices/system/cpu/cpu[1-9]*; do
          wanted=$(( ${{cpu##*/cpu}} < {count} ))
          [ $(cat $cpu/online) = $wanted ] || echo $wanted > $cpu/online
        done
    """


class MachineError(RuntimeError):
    """A machine did not start, ended, or refused a job."""


class JobError(RuntimeError):
    """A job failed or took too long. The message has the end of its output."""


class Job:
    """A program in a machine, in a session of its own. Made by `Machine.start`.

    Attributes:
        name: What errors call it.
        log: Where its output goes, stdout and stderr together; readable while it runs.
        stays: Whether it outlives a reset of the machine.
    """

    def __init__(self, machine: "Machine", number: int, name: str, log: Path, *, stays: bool):
        self.name = name
        self.log = log
        self.stays = stays
        self._machine = machine
        self._number = number
        self._started = time.monotonic()
        self._seconds: float | None = None
        self._pid: int | None = None
        self._status: int | None = None

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def pid(self) -> int | None:
        """Its process in the machine; None until that was heard of."""
        return self._pid

    @property
    def status(self) -> int | None:
        """None while it runs; negative if a signal ended it."""
        return self._status

    @property
    def seconds(self) -> float:
        """How long it has run, or had when it ended."""
        return time.monotonic() - self._started if self._seconds is None else self._seconds

    def wait(self, timeout_s: float) -> int:
        """Its exit status, when it has ended.

        Raises:
            JobError: It has not after `timeout_s` seconds, and was killed.
            MachineError: The machine ended before.
        """
        if not self._ends_within(timeout_s):
            self.kill()
            self._ends_within(_GRACE_S)
            raise JobError(f"{self} has not ended within {timeout_s:.0f} s\n{self._tail()}")
        assert self._status is not None
        return self._status

    def check(self, timeout_s: float) -> str:
        """Its output, when it has ended with status 0.

        Raises:
            JobError: It has not after `timeout_s` seconds, and was killed, or it ended with another status.
            MachineError: The machine ended before.
        """
        if (status := self.wait(timeout_s)) != 0:
            raise JobError(f"{self} ended with status {status}\n{self._tail()}")
        return self.output

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """Waits until the regular expression matches somewhere in the output.

        Raises:
            JobError: It does not after `timeout_s` seconds, or the job ended without it.
            MachineError: The machine ended before.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self._status is not None
            if found := re.search(pattern, self.output, re.MULTILINE):
                return found
            if ended:
                raise JobError(f"{self} ended with status {self._status} without writing {pattern!r}\n{self._tail()}")
            if time.monotonic() > deadline:
                raise JobError(f"{self} has not written {pattern!r} within {timeout_s:.0f} s\n{self._tail()}")
            self._ends_within(0.05)

    def kill(self, signal_number: int = signal.SIGKILL, *, group: bool = True) -> None:
        """Sends a signal to its process group, or to its first process alone; nothing if that has ended."""
        self._machine._ask(do="signal", job=self._number, signal=int(signal_number), group=group)

    def _ends_within(self, timeout_s: float) -> bool:
        return self._machine._wait_until(lambda: self._status is not None, timeout_s, f"waiting for {self.name}")

    def _tail(self) -> str:
        return "\n".join(self.output.rstrip().splitlines()[-_TAIL_LINES:])

    def __str__(self) -> str:
        return f"{self.name} on machine {self._machine.name}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """The network device of a machine.

    Attributes:
        address: Its IPv4 address.
        socket: Where the other machine is; None for a device without a link.
        listens: Whether this machine is the one that the other connects to.
    """

    address: str
    socket: Path | None = None
    listens: bool = False


class Machine:
    """One virtual machine. Made by `machines`; may be used by several threads.

    Attributes:
        name: Its host name: "a" or "b".
        address: Its IPv4 address on eth0.
        folder: Shared with this machine, under the same path: job outputs, the console, what jobs put there.
    """

    def __init__(self, name: str, command: Sequence[str], *, control: Path, address: str, folder: Path, limit_s: float):
        """Starts it.

        Args:
            name: Its host name.
            command: Runs it, with its control port connected to the socket `control`.
            control: Where to listen for it.
            address: The IPv4 address that its eth0 will have.
            folder: An existing folder.
            limit_s: Seconds after which it is killed.
        """
        self.name = name
        self.address = address
        self.folder = folder
        self._limit_s = limit_s
        self._started = time.monotonic()
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._refusals: dict[int, str] = {}
        self._resets: dict[int, list[str]] = {}
        self._ready = False
        self._gone = False
        self._warm: Future[None] | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(control))
        self._listener.listen(1)
        # `timeout` ends it even if this process cannot; a session of its own keeps Ctrl-C from it.
        with (folder / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["timeout", "--signal=KILL", f"{limit_s:.3f}", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._line: socket.socket | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def start(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        name: str | None = None,
        stays: bool = False,
    ) -> Job:
        """Starts a program as root, and waits until that has happened; not until it ends. Several may run at a time.

        If the machine's Python is being warmed, waits for that first.

        Args:
            argv: The program and its arguments, e.g. ["bash", "-ec", script] or [PYTHON, "script.py"].
            env: Added to the environment, which is otherwise the same for all jobs, not that of this process.
            cwd: Where it starts.
            name: What errors call it; the program by default.
            stays: It lives on when the machine is reset, until it ends or the machine does.

        Raises:
            MachineError: There is no such program, or the machine has ended.
            JobError: Its Python could not be warmed.
        """
        if self._warm is not None:
            self._warm.result()
        return self._start([str(argument) for argument in argv], env=env or {}, cwd=cwd, name=name, stays=stays)

    def _start(
        self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, name: str | None = None, stays: bool = False
    ) -> Job:
        name = name or Path(argv[0]).name
        number = next(self._numbers)
        log = self.folder / f"job-{number}-{re.sub(r'[^a-zA-Z0-9_.-]+', '_', name)}.log"
        job = Job(self, number, name, log, stays=stays)
        self._jobs[number] = job
        asked = {"argv": argv, "env": self._environment(env), "cwd": str(cwd), "output": str(log), "stays": stays}
        self._ask(do="start", job=number, **asked)
        told = lambda: job.pid is not None or number in self._refusals  # noqa: E731
        if not self._wait_until(told, 30.0, f"starting {name}"):
            raise MachineError(f"machine {self.name} has not started {name} within 30 s\n{self._tail()}")
        if number in self._refusals:
            raise MachineError(f"machine {self.name} could not start {shlex.join(argv)}: {self._refusals[number]}")
        return job

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        name: str | None = None,
    ) -> str:
        """Starts a program, waits until it ends, and returns what it wrote.

        Raises:
            JobError: It ended with another status than 0, or has not ended after `timeout_s` seconds and was killed.
            MachineError: There is no such program, or the machine has ended.
        """
        return self.start(argv, env=env, cwd=cwd, name=name).check(timeout_s)

    def wait_for_port(self, port: int, timeout_s: float = 30.0) -> None:
        """Waits until something in the machine listens on a TCP port. Raises JobError if nothing does in time."""
        # Without a program for each look, as to start one takes 50 ms; 0A is LISTEN.
        script = f"""
            while true; do
              for sockets in /proc/net/tcp /proc/net/tcp6; do
                while read -r _ local _ state _; do
                  [[ $local == *:{port:04X} && $state == 0A ]] && exit
                done < $sockets
              done
              sleep 0.05
            done
        """
        self.run(["bash", "-c", script], timeout_s=timeout_s, name=f"wait for port {port}")

    def set_link(self, *, up: bool) -> None:
        """Takes eth0 down or brings it up; when up, waits until the RDMA device has its address again."""
        self._configure(_LINK_UP if up else "ip link set eth0 down")

    def set_loss(self, percent: float) -> None:
        """Loses that share of the packets which eth0 sends; 0 ends it. 100 is a peer that falls silent."""
        self._configure(f"tc qdisc replace dev eth0 root netem loss {percent}%" if percent else _NO_LOSS)

    def lost_packets(self) -> int:
        """How many packets eth0 has lost since `set_loss`."""
        shown = self.run(["tc", "-s", "qdisc", "show", "dev", "eth0"], timeout_s=20.0)
        found = re.search(r"dropped (\d+)", shown)
        return int(found[1]) if found else 0

    def use_processors(self, count: int) -> None:
        """Takes all processors but the first `count` offline until the machine is reset."""
        self._configure(_use_processors(count))

    def reset(self) -> list[str]:
        """Kills jobs that still run, but those that stay, and what jobs left behind; empties /dev/shm; links it again,
        with all its processors.

        Returns what was left behind: command lines of processes and paths of files.
        """
        for job in list(self._jobs.values()):
            if job.pid is not None and job.status is None and not job.stays:
                job.kill()
                job.wait(timeout_s=30.0)
        number = next(self._numbers)
        self._ask(do="reset", job=number)
        if not self._wait_until(lambda: number in self._resets, 30.0, "killing what jobs left"):
            raise MachineError(f"machine {self.name} has not killed what jobs left within 30 s\n{self._tail()}")
        self._configure(f"{_NO_LOSS}\n{_LINK_UP}\n{_use_processors(_MOST_PROCESSORS)}")
        return self._resets[number]

    def cut_power(self) -> None:
        """Ends it as if its plug were pulled; its peer hears nothing more."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Hangs up, and kills it if it does not power off."""
        if self._line is not None:
            with contextlib.suppress(OSError):
                self._line.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
        self.cut_power()
        self._reader.join(_GRACE_S)
        self._listener.close()
        if self._line is not None:
            self._line.close()

    def wait_until_ready(self) -> None:
        """Waits until it takes jobs.

        Raises:
            MachineError: It ended or took too long. The message has the end of what it wrote to its console.
        """
        if not self._wait_until(lambda: self._ready, _BOOT_LIMIT_S, "booting"):
            raise MachineError(f"machine {self.name} is not up after {_BOOT_LIMIT_S:.0f} s\n{self._tail()}")

    def set_up_network(self, *, linked: bool) -> None:
        """Gives eth0 its address and puts the RDMA devices on. Raises JobError with what the programs said."""
        self._configure(f"""
            {"" if linked else "ip link set dummy0 name eth0"}
            ip addr add {self.address}/24 dev eth0
            ip link set eth0 mtu {MTU} up
            rdma link add {DEVICE} type rxe netdev eth0
            {_wait_for_gid(DEVICE)}
            rdma link add {LOOPBACK_DEVICE} type rxe netdev lo
            {_wait_for_gid(LOOPBACK_DEVICE)}
            printf '10.99.0.1 a\n10.99.0.2 b\n' >> /etc/hosts
        """)

    def warm_python(self, modules: Sequence[str] = warm_python.OF_ALL) -> None:
        """Begins to import what the `python` of all jobs started later is to share (see warm_python.py).

        It takes a minute. These jobs wait for it; if it fails, `start` raises why.

        Args:
            modules: What is shared; other imports take their time in each job.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix=f"warms {self.name}")
        self._warm = pool.submit(self._warm_python, modules)
        pool.shutdown(wait=False)

    def _warm_python(self, modules: Sequence[str]) -> None:
        socket_path, folder = Path("/run/warm-python"), Path(sys.executable).parent
        job = self._start(
            [sys.executable, "-m", "lamina_jax.testing.rdma.warm_python", str(socket_path), *modules],
            env={},
            cwd=ROOT,
            name="warm python",
            stays=True,
        )
        job.wait_for("^ready", timeout_s=_WARM_LIMIT_S)
        # Half an installation would be left if a reset killed it.
        install = ["bash", "-ec", warm_python.install(folder, socket_path, cold=folder / "cold-python")]
        self._start(install, env={}, cwd=Path("/"), name="install warm python", stays=True).check(30.0)

    def _configure(self, script: str) -> None:
        self._start(["bash", "-ec", script], env={}, cwd=Path("/"), name="network").check(30.0)

    def _environment(self, added: Mapping[str, str]) -> dict[str, str]:
        return {
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PATH": f"{Path(sys.executable).parent}:{_PATH}",
            "TERM": "dumb",
            **programs.cache_settings(self.folder.parent),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            **added,
        }

    def _read(self) -> None:
        """Takes the machine's call, and notes what it tells until it hangs up."""
        self._listener.settimeout(0.2)
        while self._line is None and self.alive:
            with contextlib.suppress(TimeoutError):
                self._line, _ = self._listener.accept()
        if self._line is not None:
            self._line.settimeout(None)
            # A line that breaks off was not sent to its end.
            with contextlib.suppress(OSError, ValueError), self._line.makefile("rb") as lines:
                for line in lines:
                    self._note(json.loads(line))
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    def _note(self, event: dict[str, Any]) -> None:
        with self._changed:
            job = self._jobs.get(event.get("job", 0))
            match event["event"]:
                case "ready":
                    self._ready = True
                case "started" if job:
                    job._pid = event["pid"]
                case "refused":
                    self._refusals[event["job"]] = event["why"]
                case "ended" if job:
                    job._seconds, job._status = job.seconds, event["status"]
                case "reset":
                    self._resets[event["job"]] = event["left"]
            self._changed.notify_all()

    def _ask(self, **request: object) -> None:
        line = self._line
        try:
            if line is None:
                raise OSError("not connected")
            with self._changed:
                line.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise MachineError(f"{self._end()} {error}") from error

    def _wait_until(self, done: Callable[[], bool], timeout_s: float, why: str) -> bool:
        """Whether `done()` became true in time. Raises MachineError if the machine ended before."""
        with self._changed:
            self._changed.wait_for(lambda: done() or self._gone, timeout_s)
            if done():
                return True
            if self._gone:
                raise MachineError(f"{self._end()} while {why}\n{self._tail()}")
            return False

    def _end(self) -> str:
        """What to say of its end."""
        if time.monotonic() - self._started >= self._limit_s:
            return f"machine {self.name} was killed when its {self._limit_s:.0f} s were up,"
        return f"machine {self.name} ended"

    def _tail(self) -> str:
        """The end of what it wrote to its console, and of what QEMU said."""
        logs = [self.folder / "qemu.log", self.folder / "console.log"]
        lines = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()]
        return "\n".join(lines[-_TAIL_LINES:])


@contextlib.contextmanager
def machines(
    count: int,
    *,
    folder: Path,
    image: Image | None = None,
    num_cpus: int = 2,
    memory_mib: int | None = None,
    limit_s: float = 600.0,
) -> Iterator[tuple[Machine, ...]]:
    """Boots machines, with their network up, and powers them off in the end.

    Args:
        count: 1 or 2.
        folder: For what they leave here; each gets a folder of its name in it.
        image: Kernel and first file system; made if need be by default.
        num_cpus: Of each. With 1, programs that poll wait for a clock tick with every message.
        memory_mib: Of each; 2048 for a single one and 1536 for two by default.
        limit_s: Seconds after which they are killed.

    Raises:
        SetupError: This machine lacks what it needs for that.
        MachineError: One did not start.
    """
    if count not in (1, 2):
        raise ValueError(f"expected 1 or 2 machines, got {count}")
    image = image or prepare_image()
    names = ("a", "b")[:count]
    with contextlib.ExitStack() as stack:
        # Paths of sockets are short.
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lamina-machines-")))
        started = []
        for i, name in enumerate(names):
            (folder / name).mkdir(parents=True)
            own, control = (folder / name).resolve(), sockets / f"control-{name}"
            wire = sockets / "link" if count == 2 else None
            link = Link(address=f"10.99.0.{i + 1}", socket=wire, listens=i == 0)
            command = qemu_command(
                name,
                image,
                folder=own,
                control=control,
                link=link,
                num_cpus=num_cpus,
                memory_mib=memory_mib or (2048 if count == 1 else 1536),
            )
            machine = Machine(name, command, control=control, address=link.address, folder=own, limit_s=limit_s)
            stack.callback(machine.close)
            started.append(machine)
            if wire and link.listens:
                _wait_for_socket(wire, machine)
        for machine in started:
            machine.wait_until_ready()
        at_once(lambda machine: machine.set_up_network(linked=count == 2), started)
        yield tuple(started)


def at_once[T](do: Callable[[Machine], T], machines: Sequence[Machine]) -> list[T]:
    """What `do` returns for each machine; done for all of them at the same time. Raises what it raises."""
    pool = ThreadPoolExecutor()
    try:
        return list(pool.map(do, machines))
    finally:
        # An interruption must not wait for them: they end when their machine does.
        pool.shutdown(wait=False, cancel_futures=True)


def share_processors(machines: Sequence[Machine]) -> None:
    """Leaves machines that work at the same time no more processors than this one has, so that none waits for one.

    Until they are reset.
    """
    each = max(1, (os.cpu_count() or 1) // len(machines))
    at_once(lambda machine: machine.use_processors(each), machines)


def qemu_command(
    name: str, image: Image, *, folder: Path, control: Path, link: Link, num_cpus: int, memory_mib: int
) -> list[str]:
    """The command that runs a machine: name, files, control port and link as in `Machine` and `Link`."""
    append = [
        "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off nokaslr tsc=reliable no_timer_check",
        f"lamina.name={name} lamina.folder={folder.parent} lamina.modules={image.modules}",
        f"lamina.python={sys.executable} lamina.agent={_AGENT}",
    ]
    network = ["-nic", "none"]
    if link.socket:
        stream = f"stream,id=wire,server={'on' if link.listens else 'off'},addr.type=unix,addr.path={link.socket}"
        mac = f"52:54:00:99:00:{int(link.address.rpartition('.')[2]):02x}"
        network = ["-netdev", stream, "-device", f"virtio-net-pci,netdev=wire,mac={mac}"]
    return [
        "qemu-system-x86_64",
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-name", f"lamina-{name}"),
        *("-M", "q35", "-accel", "tcg,thread=multi,tb-size=512"),
        # JAX needs AVX. Copies by byte, which erms and fsrm ask for, are emulated byte by byte.
        *("-cpu", "max,-erms,-fsrm", "-smp", str(num_cpus), "-m", f"{memory_mib}M"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", " ".join(append)),
        *("-chardev", f"file,id=console,path={folder}/console.log", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=control,path={control}", "-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=control,name=control"),
        *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
        *("-fsdev", f"local,id=folder,path={folder.parent},security_model=none,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=folder,mount_tag=folder"),
        *network,
    ]


def _wait_for_socket(path: Path, machine: Machine) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        if time.monotonic() > deadline or not machine.alive:
            raise MachineError(f"machine {machine.name} does not listen on its link\n{machine._tail()}")
        time.sleep(0.02)
