"""Channels of GPU-initiated RDMA: their device code, compiled for this CPU, against a software mlx5 NIC."""

import dataclasses
import pathlib
import re
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent
CUSTOM_CALLS = HERE.parent.parent / "custom_calls"
LIBRARY = ["cuda/gda_failure.cc", "cuda/gda_proxy_thread.cc", "cuda/nic_model/nic.cc", "wording.cc"]
THREAD, ADDRESS = "thread", "address,undefined"

CHANNEL_CASES = [
    "order",
    "wraparound",
    "sizes",
    "too_large",
    "credits",
    "recv_timeout",
    "abort_here",
    "closed_by_writer",
    "other_message",
    "batches",
    "blocks",
    "shared_queue",
    "link_down",
    "closes_once_delivered",
    "peer_gone",
    "long_waits",
    "one_probe",
    "delivered_before_gone",
    "bad_keys",
    "credit_fails",
    "stalled",
    "proxy_order",
    "proxy_shared_queue",
    "proxy_link_down",
    "proxy_closes_once_delivered",
    "proxy_peer_gone",
    "proxy_long_waits",
    "proxy_one_probe",
]
NIC_CASES = [
    "good_one",
    "doorbell_before_record",
    "record_before_wqe",
    "doorbells",
    "record_backwards",
    "fields",
    "opcode_and_size",
    "access",
    "no_remote_write",
    "flush",
    "completion_overrun",
]
END_CASES = [
    "exchange",
    "replayed",
    "closed_after_abort",
    "no_kernel_to_close",
    "proxy_exchange",
    "proxy_replayed",
]
LAYOUT_CASES = ["pointer", "inline", "doorbell", "completions"]


def build(program: pathlib.Path, sources: list[str], sanitizer: str, custom_calls: pathlib.Path = CUSTOM_CALLS) -> None:
    """Compiles a test of this directory with the given sanitizer."""
    flags = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", f"-fsanitize={sanitizer}", "-pthread"]
    include = [f"-I{custom_calls}", f"-I{custom_calls / 'cuda'}", f"-I{HERE}"]
    library = [custom_calls / name for name in LIBRARY]
    files = [str(path) for path in [*(HERE / name for name in sources), *library]]
    subprocess.run(["g++", *flags, *include, *files, "-o", str(program)], check=True, timeout=300)


def run(program: pathlib.Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    # -R: the sanitizer of older compilers does not know how far newer kernels spread addresses.
    command = ["setarch", "-R", str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)


def require_ok(program: pathlib.Path, cases: list[str]) -> None:
    done = run(program)
    expected = "".join(f"ok {case}\n" for case in cases)
    assert (done.returncode, done.stdout) == (0, expected), done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", [THREAD, ADDRESS])
def test_channel(tmp_path, sanitizer):
    program = tmp_path / "gda_channel"
    build(program, ["gda_channel.cc"], sanitizer)
    require_ok(program, CHANNEL_CASES)


def test_software_nic_notices(tmp_path):
    program = tmp_path / "gda_nic"
    build(program, ["gda_nic.cc"], ADDRESS)
    require_ok(program, NIC_CASES)


def test_bytes_are_those_of_rdma_core(tmp_path):
    found = subprocess.run(
        ["g++", "-E", "-x", "c++", "-"],
        input="#include <infiniband/mlx5dv.h>",
        capture_output=True,
        text=True,
        timeout=60,
    )
    if found.returncode != 0:
        pytest.skip("needs rdma-core's headers: apt-get install libibverbs-dev")
    program = tmp_path / "gda_layout"
    build(program, ["gda_layout.cc"], ADDRESS)
    require_ok(program, LAYOUT_CASES)


def test_ends_over_a_cuda_of_the_host(tmp_path):
    """What graphs that outlive their channel touch, too."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc, for CUDA's headers")
    program = tmp_path / "gda_end"
    flags = ["-std=c++20", "-O1", "-g", "-cudart", "none"]
    host = f"-Xcompiler=-Wall,-Wextra,-Werror,-pthread,{','.join(f'-fsanitize={name}' for name in ADDRESS.split(','))}"
    include = [f"-I{CUSTOM_CALLS}", f"-I{CUSTOM_CALLS / 'cuda'}", f"-I{HERE}"]
    files = [HERE / "gda_end.cc", *(CUSTOM_CALLS / name for name in [*LIBRARY, "cuda/gda_end.cc"])]
    subprocess.run([nvcc, *flags, host, *include, *map(str, files), "-o", str(program)], check=True, timeout=300)
    require_ok(program, END_CASES)


def test_kernels_on_a_gpu(tmp_path):
    """The same code in kernels and CUDA graphs, the software NIC polling pinned memory."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or shutil.which("nvidia-smi") is None:
        pytest.skip("needs nvcc and a GPU")
    program = tmp_path / "gda_gpu"
    # 20014: groups of tests live on the host only, those of kernels on the device only.
    flags = ["-std=c++20", "-arch=native", "--expt-relaxed-constexpr", "-O1", "-diag-suppress", "20014"]
    names = [*LIBRARY, "cuda/gda_kernels.cu"]
    files = [HERE / "gda_gpu.cu", *(CUSTOM_CALLS / name for name in names if (CUSTOM_CALLS / name).exists())]
    include = [f"-I{CUSTOM_CALLS}", f"-I{CUSTOM_CALLS / 'cuda'}", f"-I{HERE}"]
    subprocess.run([nvcc, *flags, *include, *map(str, files), "-o", str(program)], check=True, timeout=300)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=200)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert (done.returncode, done.stdout) == (0, "ok small\nok large\nok proxy\n"), done.stdout + done.stderr


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A mistake: in `file`, `right` (statements if it ends with a semicolon, else an expression) becomes `wrong`.

    `case` is the test that must notice.
    """

    name: str
    file: str
    right: str
    wrong: str
    case: str = "order"

    def applied(self, number: int, text: str) -> str:
        """`text` in which the mistake is made if the variable `mutation` has this number."""
        assert text.count(self.right) == 1, f"{self.name}: expected its place in {self.file} once"
        if self.right.endswith(";"):
            return text.replace(self.right, f"if (mutation == {number}) {{ {self.wrong} }} else {{ {self.right} }}")
        return text.replace(self.right, f"(mutation == {number} ? ({self.wrong}) : ({self.right}))")


RECORD = "StoreReleaseSystem(&queue.record[kSendRecord], SendRecordValue(producer));"
DOORBELL = "StoreMmio64(queue.doorbell, DoorbellValue(WqeAt(queue, producer - 1)));"
POST = "PostOf(end, writes, 2, NowNs() + end.timeout_ns)"
MUTATIONS = [
    Mutation(
        "the doorbell rings before the record is written",
        "gda_queue.h",
        f"{RECORD}\n  FenceSystem();\n  {DOORBELL}",
        f"{DOORBELL} for (int i = 0; i < 100; ++i) Nanosleep(0); {RECORD}",
    ),
    Mutation(
        "WQEs carry the index of the next",
        "mlx5_layout.h",
        "(static_cast<std::uint32_t>(index) & 0xffffu) << 8",
        "(static_cast<std::uint32_t>(index + 1) & 0xffffu) << 8",
    ),
    Mutation(
        "the record has more than 16 bits",
        "mlx5_layout.h",
        "SwapBytes32(static_cast<std::uint32_t>(producer) & 0xffffu)",
        "SwapBytes32(static_cast<std::uint32_t>(producer))",
        "wraparound",
    ),
    Mutation(
        "the sequence number travels before the payload",
        "gda_channel.h",
        POST,
        f"[&] {{ const Write other[2] = {{writes[1], writes[0]}}; return {POST.replace('writes', 'other')}; }}()",
    ),
    Mutation(
        "WQEs are overwritten before they are done",
        "gda_queue.h",
        "end - LoadAcquireSystem(&queue.state->completed) <= std::uint64_t{1} << queue.log_num_wqes",
        "true",
    ),
    Mutation(
        "the writer takes one slot more than there are",
        "gda_channel.h",
        "sequence < LoadAcquireSystem(&HeaderOf(end)->credit) + end.num_slots",
        "sequence <= LoadAcquireSystem(&HeaderOf(end)->credit) + end.num_slots",
    ),
    Mutation(
        "the NIC is not told which completions were read",
        "gda_queue.h",
        "StoreReleaseSystem(&queue.cq_record[kCqConsumerRecord], CqConsumerValue(consumer + 1));",
        ";",
    ),
    Mutation(
        "completions of the last round count again",
        "gda_queue.h",
        "tail.opcode() != kCqeInvalid && tail.owner() == round",
        "tail.opcode() != kCqeInvalid",
    ),
    Mutation(
        "the payload is read without acquiring it",
        "waiting.h",
        "LoadAcquireSystem(published) != before",
        "LoadRelaxedSystem(published) != before",
    ),
    Mutation(
        "senders do not wait for their turn",
        "gda_queue.h",
        "LoadAcquireSystem(&queue.state->ready) == position",
        "true",
        "shared_queue",
    ),
    Mutation(
        "the reader withholds credits for good",
        "gda_channel.h",
        "read - end.credited < CreditBatch(end.num_slots)",
        "true",
    ),
    Mutation(
        "who waits does not ask whether the peer is there",
        "waiting.h",
        "now - probed < kProbeNs",
        "true",
        "peer_gone",
    ),
    Mutation(
        "who waits asks again and again, though nothing is answered",
        "gda_queue.h",
        "AtomicCasDevice(&queue.state->reserved, completed, completed + 1) != completed",
        "Post(queue, &write, 1, deadline_ns) == kOk",
        "one_probe",
    ),
    Mutation(
        "the CPU proxy does not say what is complete",
        "gda_proxy_thread.cc",
        "StoreReleaseSystem(&proxy_.words->completed, completed);",
        ";",
        "proxy_long_waits",
    ),
    Mutation(
        "a credit that nobody takes fails the message before it",
        "gda_channel.h",
        "error == kStuck",
        "error != kOk",
        "delivered_before_gone",
    ),
]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One program with all the mistakes in it; the environment variable MUTATION chooses."""
    folder = tmp_path_factory.mktemp("mutants")
    sources = folder / "custom_calls"
    shutil.copytree(CUSTOM_CALLS, sources)
    for number, mutation in enumerate(MUTATIONS, start=1):
        path = sources / "cuda" / mutation.file
        path.write_text(mutation.applied(number, path.read_text()))
    ptx = sources / "cuda" / "ptx.h"
    choose = 'inline const int mutation = std::atoi(std::getenv("MUTATION"));'
    text = re.sub(r"(namespace lamina::cuda \{)", rf"#include <cstdlib>\n\1\n{choose}", ptx.read_text(), count=1)
    ptx.write_text(text)
    build(folder / "program", ["gda_channel.cc"], THREAD, sources)
    return folder / "program"


TRIES = 5  # some mistakes show only if threads meet


def run_mutant(program: pathlib.Path, number: int, case: str) -> subprocess.CompletedProcess[str]:
    env = {"MUTATION": str(number), "GDA_PATIENT_S": "0.3" if number else "60", "TSAN_OPTIONS": "halt_on_error=1"}
    return run(program, case, env=env)


def test_no_mistake_no_failure(mutants):
    for case in sorted({mutation.case for mutation in MUTATIONS}):
        done = run_mutant(mutants, 0, case)
        assert (done.returncode, done.stdout) == (0, f"ok {case}\n"), done.stdout + done.stderr


@pytest.mark.parametrize("number", range(1, len(MUTATIONS) + 1), ids=[mutation.name for mutation in MUTATIONS])
def test_every_mistake_is_noticed(mutants, number):
    for _ in range(TRIES):
        done = run_mutant(mutants, number, MUTATIONS[number - 1].case)
        if done.returncode != 0:
            break
    assert done.returncode != 0, f"nothing noticed that {MUTATIONS[number - 1].name}"
    assert "FAILED" in done.stdout or "ThreadSanitizer" in done.stderr, done.stdout + done.stderr
