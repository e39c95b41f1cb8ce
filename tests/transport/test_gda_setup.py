"""What of the set-up of gda channels can be tested without a NIC: its refusals, and the structures it shares with C."""

import ctypes
import importlib.util
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from lamina_jax.transport import gda_link, rc_queue_pair

HEADERS = "#include <cstddef>\n#include <cstdio>\n#include <infiniband/mlx5dv.h>\n"

STRUCTURES = {
    "ibv_qp_cap": rc_queue_pair._Cap,
    "ibv_qp_init_attr": rc_queue_pair._QpInitAttr,
    "ibv_global_route": rc_queue_pair._GlobalRoute,
    "ibv_ah_attr": rc_queue_pair._AhAttr,
    "ibv_qp_attr": rc_queue_pair._QpAttr,
    "ibv_qp": rc_queue_pair._QpHead,
    "mlx5dv_qp": gda_link._DvQp,
    "mlx5dv_cq": gda_link._DvCq,
}
# Fields whose names are a path in C.
PATHS = {"bf_reg": "bf.reg", "bf_size": "bf.size"}

CONSTANTS = {
    "IBV_QPT_RC": rc_queue_pair._RC,
    "IBV_QPS_INIT": rc_queue_pair._INIT,
    "IBV_QPS_RTR": rc_queue_pair._RTR,
    "IBV_QPS_RTS": rc_queue_pair._RTS,
    "IBV_LINK_LAYER_ETHERNET": rc_queue_pair._ETHERNET,
    "IBV_ACCESS_LOCAL_WRITE": rc_queue_pair.LOCAL_WRITE,
    "IBV_ACCESS_REMOTE_WRITE": rc_queue_pair.REMOTE_WRITE,
    "MLX5DV_OBJ_QP": gda_link._OBJ_QP,
    "MLX5DV_OBJ_CQ": gda_link._OBJ_CQ,
    "IBV_QP_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX | IBV_QP_PORT": rc_queue_pair._MASK_INIT,
    "IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_RQ_PSN | IBV_QP_MIN_RNR_TIMER | IBV_QP_MAX_DEST_RD_ATOMIC"
    " | IBV_QP_DEST_QPN": rc_queue_pair._MASK_RTR,
    "IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC"
    " | IBV_QP_SQ_PSN": rc_queue_pair._MASK_RTS,
    "sizeof(mlx5dv_obj)": ctypes.sizeof(gda_link._DvObj),
    "offsetof(mlx5dv_obj, cq)": 2 * ctypes.sizeof(ctypes.c_void_p),
}


def what_c_says(expressions: list[str], folder) -> list[int]:
    lines = "\n".join(f'std::printf("%zu\\n", std::size_t({expression}));' for expression in expressions)
    source = folder / "ask.cc"
    source.write_text(f"{HEADERS}int main() {{\n{lines}\n}}\n")
    subprocess.run(["g++", "-std=c++17", str(source), "-o", str(folder / "ask")], check=True, timeout=120)
    answer = subprocess.run([str(folder / "ask")], capture_output=True, text=True, check=True, timeout=60)
    return [int(line) for line in answer.stdout.split()]


@pytest.fixture
def headers() -> None:
    found = subprocess.run(["g++", "-E", "-x", "c++", "-"], input=HEADERS, capture_output=True, text=True, timeout=60)
    if found.returncode != 0:
        pytest.skip("needs rdma-core's headers: apt-get install libibverbs-dev")


@pytest.mark.usefixtures("headers")
def test_structures_are_those_of_rdma_core(tmp_path):
    expected: dict[str, int] = dict(CONSTANTS)
    for name, structure in STRUCTURES.items():
        if structure is not rc_queue_pair._QpHead:  # only the start of it
            expected[f"sizeof({name})"] = ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            expected[f"offsetof({name}, {PATHS.get(field, field)})"] = getattr(structure, field).offset
    assert dict(zip(expected, what_c_says(list(expected), tmp_path), strict=True)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": -1}, "gpu must be CUDA's number of a GPU, got -1"),
        ({"port": 0}, "port counts from 1, got 0"),
        ({"gid_index": -1}, "gid_index must not be negative, got -1"),
        ({"num_wqes": 1000}, "num_wqes must be a power of two, got 1000"),
        ({"num_wqes": 8}, "num_wqes must be 16 to 32768, got 8"),
        ({"num_wqes": 65536}, "num_wqes must be 16 to 32768, got 65536"),
    ],
)
def test_link_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        gda_link.Link(**({"device": "mlx5_0", "gpu": 0} | arguments))


@pytest.mark.skipif(
    importlib.util.find_spec("pyverbs") is not None and importlib.util.find_spec("lamina_jax._gda_calls") is not None,
    reason="everything that a link needs is installed",
)
def test_link_says_what_is_missing():
    with pytest.raises(ImportError, match=r"gda channels need .*(nvcc|pyverbs)"):
        gda_link.Link(device="mlx5_0", gpu=0)


class Machine:
    """In place of pyverbs, rdma-core and the CUDA build: notes what is made and destroyed, and refuses one thing."""

    def __init__(self, refused: str = ""):
        self.refused = refused
        self.events: list[str] = []
        self._pd, self._head = ctypes.c_void_p(0x77), rc_queue_pair._QpHead(qp_num=5)

    def make(self, name: str) -> None:
        if name == self.refused:
            raise OSError(f"no {name}")
        self.events.append(f"+{name}")

    def made(self, name: str, **attributes: Any) -> Any:
        """Something with a `close`."""
        self.make(name)
        return SimpleNamespace(close=lambda: self.events.append(f"-{name}"), **attributes)

    def module(self, name: str, needed: str) -> Any:
        del needed
        return {
            "pyverbs.device": SimpleNamespace(Context=lambda name: self.made("context")),
            "pyverbs.pd": SimpleNamespace(PD=lambda context: self.made("pd", pd=ctypes.addressof(self._pd))),
        }[name]

    def library(self, name: str) -> Any:
        self.make(name)
        return SimpleNamespace(mlx5dv_init_obj=self._describe)

    @property
    def verbs(self) -> Any:
        def create(what: str, pointer: int) -> Any:
            def create(*_: object) -> int | None:
                if what == self.refused:
                    return None
                self.make(what)
                return pointer

            return create

        def destroy(what: str, pointer: int) -> Any:
            def destroy(got: ctypes.c_void_p) -> int:
                assert got.value == pointer
                self.events.append(f"-{what}")
                return 0

            return destroy

        queue_pair = ctypes.addressof(self._head)
        return SimpleNamespace(
            ibv_create_cq=create("cq", 0x99),
            ibv_create_qp=create("qp", queue_pair),
            ibv_destroy_cq=destroy("cq", 0x99),
            ibv_destroy_qp=destroy("qp", queue_pair),
        )

    def _describe(self, obj: Any, flags: Any) -> int:
        del flags
        dv_qp = ctypes.cast(obj._obj.pointers[1], ctypes.POINTER(gda_link._DvQp)).contents
        dv_qp.sq.wqe_cnt, dv_qp.sq.stride = 512, 64
        dv_cq = ctypes.cast(obj._obj.pointers[3], ctypes.POINTER(gda_link._DvCq)).contents
        dv_cq.cqe_cnt, dv_cq.cqe_size = 1024, 64
        return 0

    def calls(self) -> Any:
        queue = SimpleNamespace(make=lambda **_: self.made("queue", uses_proxy=False))
        end = SimpleNamespace(make=lambda **_: self.made("end", region=0, region_bytes=64, export_dmabuf=lambda: -1))
        return SimpleNamespace(GpuQueue=queue, GpuEnd=end)

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> "Machine":
        for name in ("module", "library", "calls"):
            monkeypatch.setattr(gda_link, f"_{name}", getattr(self, name))
        monkeypatch.setattr(rc_queue_pair, "verbs_library", lambda: self.verbs)
        return self


STEPS = ["context", "pd", "libmlx5.so.1", "cq", "qp", "queue"]


def undone(steps: list[str]) -> list[str]:
    return [f"-{step}" for step in reversed(steps) if not step.startswith("lib")]


def test_link_undoes_what_it_did(monkeypatch):
    machine = Machine().replace(monkeypatch)
    link = gda_link.Link(device="mlx5_0", gpu=0)
    assert machine.events == [f"+{step}" for step in STEPS]
    machine.events.clear()
    link.close()
    assert machine.events == undone(STEPS)


@pytest.mark.parametrize("refused", STEPS)
def test_link_that_is_refused_leaves_nothing(monkeypatch, refused):
    machine = Machine(refused).replace(monkeypatch)
    with pytest.raises(OSError, match=rf"no {refused}|ibv_create_{refused} .*failed"):
        gda_link.Link(device="mlx5_0", gpu=0)
    before = STEPS[: STEPS.index(refused)]
    assert machine.events == [f"+{step}" for step in before] + undone(before)


def test_end_whose_memory_is_refused_leaves_nothing(monkeypatch):
    machine = Machine().replace(monkeypatch)
    link = gda_link.Link(device="mlx5_0", gpu=0)
    machine.events.clear()

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no memory region")

    monkeypatch.setattr(gda_link, "_module", lambda name, needed: SimpleNamespace(MR=refuse))
    with pytest.raises(OSError, match="no memory region"):
        gda_link.GdaEnd(link, role="writer", peer="the peer", slot_bytes=64)
    assert machine.events == ["+end", "-end"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_slots": 0}, "num_slots must be at least 1, got 0"),
        ({"slot_bytes": 100}, "slot_bytes must be a multiple of 64 below 2 GB, got 100"),
        ({"slot_bytes": 1 << 31}, "slot_bytes must be a multiple of 64 below 2 GB, got 2147483648"),
        ({"timeout_s": 0.0}, "timeout_s must be positive, got 0"),
    ],
)
def test_end_refuses(arguments, message):
    link = object.__new__(gda_link.Link)  # arguments are looked at before the link is
    good: dict[str, Any] = {"role": "writer", "peer": "the peer", "slot_bytes": 64}
    with pytest.raises(ValueError, match=message):
        gda_link.GdaEnd(link, **(good | arguments))
