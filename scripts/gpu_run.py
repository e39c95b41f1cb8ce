"""Runs the tests or the benchmarks that need a GPU, on a machine with little more than Python, JAX and CUDA's compiler.

    python3 scripts/gpu_run.py test|bench [--tiny] [--seconds=470] [--results=benchmarks/results]

Needs no network and no virtual environment, and of this project nothing installed: it says what the machine has,
installs what it lacks from wheels in .gpu-wheels (`make gpu-wheels` downloads them) into build/gpu/site, compiles the
custom calls into lamina_jax/, and runs one part after another, each in a process of its own. A part that fails or hangs
costs the others nothing but the time that is theirs to give: each part is sure of some of it, and gets what those
before it left over. What a part printed is in build/gpu/logs.

Last comes a table, part | result | seconds. The status is 1 if a part failed; where there is a GPU, a test that was
skipped for want of one is a failure. This file imports nothing but the standard library.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
WHEELS: Final = ROOT / ".gpu-wheels"
BUILD: Final = ROOT / "build" / "gpu"
SITE: Final = BUILD / "site"
LOGS: Final = BUILD / "logs"

PASSED, SKIPPED, FAILED = "passed", "skipped", "FAILED"

_TESTED_WITH: Final = ("beartype", "hypothesis", "nanobind", "psutil", "pytest", "pytest-timeout")
"""Of the development dependencies those that the build and the tests of a GPU need."""
_GIVEN: Final = ("jax", "jaxlib", "numpy", "ml_dtypes")
"""What the machine must have: JAX belongs to its driver."""
_VERSIONS: Final = (*_GIVEN, "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "nanobind", "pytest")
_COUNTED: Final = re.compile(r"^(?P<test>\S+::.*?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
_STARTED: Final = re.compile(r"^(?P<test>\S+\.py::.*?) *$")
_REASON: Final = re.compile(r"^SKIPPED \[\d+\] \S+ (?P<reason>.*)$")
_TAIL_LINES: Final = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A program to run."""

    name: str
    command: Sequence[str]
    sure_s: float
    """Seconds that no part before it may take away."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tests: bool = False
    """Whether it is pytest, whose outcomes are counted."""
    figures: Path | None = None
    """Where a benchmark writes its JSON."""
    shows: bool = False
    """Whether what it prints is for the reader, also if all went well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A line of the table."""

    name: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def words(self) -> str:
        """Outcome and detail."""
        return f"{self.outcome}: {self.detail}" if self.detail else self.outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended."""

    status: int | None
    """None if it was killed because its time was up."""
    output: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is."""

    gpu: str | None
    """What nvidia-smi calls the first GPU; None where it shows none."""
    jax_gpu: str | None
    """What JAX calls it; None where JAX has no GPU."""
    nvcc: str | None
    facts: Mapping[str, str]
    """For the reader, and for the results."""


def run_bounded(command: Sequence[str], *, log: Path, limit_s: float, environment: Mapping[str, str]) -> Ended:
    """Runs a command, with its output in a file, and kills it and its children when its time is up."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(max(limit_s, 1.0))
        except subprocess.TimeoutExpired:
            status = None
        except BaseException:
            _kill(process)
            raise
    if status is None:
        _kill(process)
    return Ended(status=status, output=log.read_text(errors="replace"), seconds=time.monotonic() - start)


def _kill(process: subprocess.Popen) -> None:
    """Attention workers have groups of their own, and end when they see that their engine has."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def judge(part: Part, ended: Ended, *, has_gpu: bool) -> Result:
    """What to say of a part that has ended."""
    counts = _counts(ended.output) if part.tests else {}
    reasons = [found["reason"] for found in map(_REASON.match, ended.output.splitlines()) if found]
    detail = ", ".join(f"{n} {outcome.lower()}" for outcome, n in counts.items())
    if counts and reasons:
        detail += f" ({reasons[0]})"
    if ended.status is None:
        where = f" in {test}" if (test := _last_started(ended.output)) else ""
        outcome, detail = FAILED, f"its time was up after {ended.seconds:.0f} s{where}; {detail or 'nothing done'}"
    elif part.tests and not counts:
        outcome, detail = FAILED, f"no test ran, status {ended.status}"
    elif ended.status != 0:
        outcome, detail = FAILED, detail or f"status {ended.status}"
    elif has_gpu and any("GPU" in reason for reason in reasons):
        # There is one, and something kept it from being tested.
        outcome = FAILED
    elif part.tests and "PASSED" not in counts:
        outcome = SKIPPED
    else:
        outcome = PASSED
    return Result(name=part.name, outcome=outcome, detail=detail, seconds=ended.seconds)


def _counts(output: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for found in filter(None, map(_COUNTED.match, output.splitlines())):
        counts[found["outcome"]] = counts.get(found["outcome"], 0) + 1
    return counts


def _last_started(output: str) -> str | None:
    """The test whose line has no outcome yet."""
    started = _STARTED.match(output.splitlines()[-1]) if output.strip() else None
    return started["test"] if started else None


def run_parts(parts: Sequence[Part], *, deadline: float, has_gpu: bool) -> Iterator[Result]:
    """Runs parts in turn; each may take what is left until the deadline but for what those behind it are sure of."""
    for i, part in enumerate(parts):
        limit = deadline - time.monotonic() - sum(later.sure_s for later in parts[i + 1 :])
        print(f"\n== {part.name} (at most {max(limit, 1):.0f} s)", flush=True)
        command = [argument.replace("{seconds}", f"{max(limit - 15, 1):.0f}") for argument in part.command]
        log = LOGS / f"{part.name.replace(' ', '-')}.log"
        ended = run_bounded(command, log=log, limit_s=limit, environment=part.environment)
        result = judge(part, ended, has_gpu=has_gpu)
        lines = ended.output.rstrip().splitlines()
        if part.shows or result.outcome == FAILED:
            print("\n".join(lines if part.shows and result.outcome != FAILED else lines[-_TAIL_LINES:]))
        print(f"{part.name}: {result.words} ({result.seconds:.0f} s; {log.relative_to(ROOT)})", flush=True)
        yield result


def look_around(environment: Mapping[str, str]) -> Machine:
    """Finds out what the machine has; says so."""
    asked = _said(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    cuda = re.search(r"release (\S+),", _said([nvcc, "--version"]) or "") if nvcc else None
    probe = "import jax; print('devices:', *(d.device_kind for d in jax.devices() if d.platform == 'gpu'), sep='\\n= ')"
    seen = run_bounded(
        [sys.executable, "-c", probe],
        log=LOGS / "devices.log",
        limit_s=90,
        environment={**environment, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    facts = {
        "host": f"{platform.platform()}, {os.cpu_count()} CPUs, {_memory_gb():.0f} GB",
        "python": f"{platform.python_version()} {sys.executable}",
        "gpu": asked.splitlines()[0] if asked else "none that nvidia-smi shows",
        "nvcc": f"{cuda[1] if cuda else 'unknown'} {nvcc}" if nvcc else "none",
        "cmake": (_said(["cmake", "--version"]) or "none").splitlines()[0],
        **{name: version for name in _VERSIONS if (version := _version(name))},
    }
    for name, fact in facts.items():
        print(f"{name:<20} {fact}")
    found = re.search(r"^= (.*)$", seen.output, re.MULTILINE)
    print(f"{'JAX sees':<20} {found[1] if found else 'no GPU'}", flush=True)
    return Machine(gpu=facts["gpu"] if asked else None, jax_gpu=found[1] if found else None, nvcc=nvcc, facts=facts)


def check_machine(machine: Machine) -> str:
    """Raises RuntimeError, with what to do, where nothing can work."""
    bounds = _bounds()
    for name in _GIVEN:
        version = _version(name)
        if version is None or not bounds[_plain(name)].specifier.contains(version, prereleases=True):
            raise RuntimeError(f"the machine must have {bounds[_plain(name)]}, got {version or 'none'}")
    if shutil.which("cmake") is None:
        raise RuntimeError("the machine must have CMake, got none on the PATH")
    if machine.gpu and machine.jax_gpu is None and "cuda" in os.environ.get("JAX_PLATFORMS", "cuda"):
        raise RuntimeError(f"nvidia-smi shows {machine.gpu}, but JAX finds no GPU: see build/gpu/logs/devices.log")
    if machine.jax_gpu and machine.nvcc is None:
        raise RuntimeError("there is a GPU, but no nvcc on the PATH or in /usr/local/cuda/bin to compile for it")
    return machine.jax_gpu or "no GPU: what needs one is skipped"


def install_missing() -> str:
    """Installs what the machine lacks, or has in a version of no use, from .gpu-wheels into SITE.

    Raises:
        RuntimeError: something needed is not there either.
    """
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    bounds = _bounds()
    missing = [name for name in _listed() if not _usable(name, bounds)]
    wheels = {_plain(path.name.split("-")[0]): path for path in sorted(WHEELS.glob("*.whl"))}
    found = [wheels[_plain(name)] for name in missing if _plain(name) in wheels]
    nowhere = [name for name in missing if _plain(name) not in wheels]
    if found:
        options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
        ended = run_bounded(
            [sys.executable, "-m", "pip", "install", *options, "--target", str(SITE), *map(str, found)],
            log=LOGS / "packages.log",
            limit_s=150,
            environment={},
        )
        if ended.status != 0:
            how = "its time was up" if ended.status is None else f"status {ended.status}"
            raise RuntimeError(f"pip: {how}: {ended.output[-1000:].strip()}")
    # Others may be what only our versions of packages need.
    if needed := [name for name in nowhere if _plain(name) in bounds]:
        raise RuntimeError(
            f"no {', '.join(needed)} here, nor a wheel in {WHEELS.name}: run `make gpu-wheels` elsewhere"
        )
    without = f"; without {', '.join(nowhere)}" if nowhere else ""
    return f"{len(found)} installed, {len(_listed()) - len(missing)} were there{without}"


def build(machine: Machine, environment: Mapping[str, str], limit_s: float) -> str:
    """Compiles the custom calls into lamina_jax/. Raises RuntimeError if that fails or takes too long."""
    folder = BUILD / "cmake"
    configure = ["cmake", "--fresh", "-S", "custom_calls", "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DLAMINA_CUDA={'ON' if machine.nvcc else 'OFF'}"]
    if machine.nvcc:
        configure.append(f"-DCMAKE_CUDA_COMPILER={machine.nvcc}")
    compile_all = ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count())]
    install = ["cmake", "--install", str(folder), "--prefix", str(ROOT)]
    deadline = time.monotonic() + limit_s
    for step, command in (("configure", configure), ("compile", compile_all), ("install", install)):
        log, left = LOGS / f"build-{step}.log", deadline - time.monotonic()
        ended = run_bounded(command, log=log, limit_s=left, environment=environment)
        if ended.status != 0:
            print("\n".join(ended.output.splitlines()[-_TAIL_LINES:]))
            how = "its time was up" if ended.status is None else f"status {ended.status}"
            raise RuntimeError(f"could not {step}: {how}; see {log.relative_to(ROOT)}")
    return "with CUDA" if machine.nvcc else "without CUDA: no nvcc"


def attempt(name: str, work: Callable[[], str]) -> Result:
    """A part that is done here. Prints what it says."""
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    try:
        outcome, detail = PASSED, work()
    except RuntimeError as error:
        outcome, detail = FAILED, str(error)
    print(f"{name}: {outcome}: {detail}", flush=True)
    return Result(name=name, outcome=outcome, detail=detail, seconds=time.monotonic() - start)


def test_parts(machine: Machine, environment: Mapping[str, str]) -> list[Part]:
    """The tests, the most telling ones first."""

    def part(name: str, sure_s: float, *tests: str, **more: str) -> Part:
        options = ["-v", "-rs", "-p", "no:cacheprovider", "-W", "default", "--timeout=150", *tests]
        command = [sys.executable, "-m", "pytest", *options]
        return Part(name=name, command=command, sure_s=sure_s, environment={**environment, **more}, tests=True)

    native = {"LAMINA_TEST_PLATFORM": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if machine.jax_gpu else {}
    return [
        part("tokens", 150, "tests/gpu/test_generate.py"),
        part("attention kernel", 70, "tests/gpu/test_mosaic_kernel.py", **native),
        part("channels", 90, "tests/gpu/test_cuda_channel.py"),
        part("rdma", 50, "tests/transport/test_gda.py::test_kernels_on_a_gpu"),
    ]


def bench_parts(machine: Machine, environment: Mapping[str, str], *, tiny: bool) -> list[Part]:
    """The benchmarks."""
    small = {
        "gpu_attention": ["--interpret", "--batch=1,2", "--context=64,100", "--repeats=1"],
        "gpu_decode": ["--tiny"],
    }

    def part(name: str, program: str, sure_s: float, *options: str) -> Part:
        figures = LOGS / f"{program}.json"
        figures.unlink(missing_ok=True)
        options = (*options, *(small[program] if tiny else []), f"--json={figures}")
        return Part(
            name=name,
            command=[sys.executable, "-u", f"benchmarks/{program}.py", *options],
            sure_s=sure_s,
            environment=environment,
            figures=figures,
            shows=True,
        )

    shapes = ("--batch=1,16,256", "--context=512,4096,65536", "--kv_cache_dtype=auto,fp8,int8")
    attention = part("attention kernel", "gpu_attention", 60, "--seconds=75", *shapes)
    decode = part("decode", "gpu_decode", 200, "--seconds={seconds}")
    if tiny:
        return [attention, decode]
    # The last one takes all the time that is left.
    return [attention, part("channels", "gpu_channel", 75), decode] if machine.jax_gpu else []


def write_results(folder: Path, machine: Machine, parts: Sequence[Part], results: Sequence[Result]) -> Path:
    """Writes what the benchmarks found, with machine and versions; returns the file."""
    device = re.sub(r"[^a-z0-9]+", "-", (machine.jax_gpu or "cpu").lower()).strip("-")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    figures = {
        part.name: json.loads(part.figures.read_text())
        for part in parts
        if part.figures is not None and part.figures.exists()
    }
    path = folder / f"gpu-{device}-{today}.json"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "date": today,
        "machine": dict(machine.facts),
        "results": [dataclasses.asdict(result) for result in results],
        "figures": figures,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def print_table(results: Sequence[Result]) -> None:
    """The last thing that is printed."""
    rows = [("part", "result", "seconds"), *((r.name, r.words.replace("\n", " "), f"{r.seconds:.0f}") for r in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"| {a:<{widths[0]}} | {b:<{widths[1]}} | {c:>{widths[2]}} |" for a, b, c in rows]
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    print("\n".join(["", lines[0], rule, *lines[1:]]), flush=True)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Tests or measures lamina_jax on a GPU.")
    parser.add_argument("what", choices=["test", "bench"])
    parser.add_argument("--tiny", action="store_true", help="benchmarks of a size for CPUs, to see that they work")
    parser.add_argument("--seconds", type=float, default=460.0, help="for everything")
    parser.add_argument("--results", type=Path, help="folder of the benchmarks' results")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + options.seconds
    LOGS.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(SITE), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # SITE has only what the machine lacks, so that being first it hides nothing of the machine's.
    environment = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if options.tiny:
        environment["JAX_PLATFORMS"] = "cpu"
    machine = look_around(environment)
    if machine.jax_gpu and machine.nvcc:
        environment["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(machine.nvcc).parent)])

    results = [attempt("machine", lambda: check_machine(machine))]
    results.append(attempt("packages", install_missing))
    results.append(attempt("build", lambda: build(machine, environment, limit_s=options.seconds / 3)))
    parts = (
        test_parts(machine, environment)
        if options.what == "test"
        else bench_parts(machine, environment, tiny=options.tiny)
    )
    if results[-1].outcome == FAILED:
        results += [Result(name=part.name, outcome=FAILED, detail="not run: nothing was built") for part in parts]
    else:
        results += run_parts(parts, deadline=deadline, has_gpu=machine.jax_gpu is not None)
    if not parts:
        results.append(
            Result(name="benchmarks", outcome=SKIPPED, detail="they need a GPU; --tiny shows that they work")
        )
    if options.what == "bench":
        folder = options.results or (BUILD if options.tiny else ROOT / "benchmarks" / "results")
        print(f"\nresults: {write_results(folder, machine, parts, results)}")
    print_table(results)
    return int(any(result.outcome == FAILED for result in results))


def _said(command: Sequence[str]) -> str | None:
    """What a program prints; None if there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _memory_gb() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _listed() -> list[str]:
    lines = (ROOT / "requirements-gpu.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _bounds() -> dict:
    """By name what pyproject.toml asks for, of what runs or tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parse = _requirement_class()
    asked = [parse(line) for line in project["project"]["dependencies"]]
    asked += [r for r in map(parse, project["dependency-groups"]["dev"]) if _plain(r.name) in _TESTED_WITH]
    return {_plain(requirement.name): requirement for requirement in asked}


def _requirement_class() -> type:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        # pip has its own.
        from pip._vendor.packaging.requirements import Requirement  # pyright: ignore[reportMissingImports]
    return Requirement


def _usable(name: str, bounds: Mapping) -> bool:
    version = _version(name)
    asked = bounds.get(_plain(name))
    return version is not None and (asked is None or asked.specifier.contains(version, prereleases=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
