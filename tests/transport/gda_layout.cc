// The bytes of mlx5_layout.h, and those of the software NIC, against rdma-core's own declarations.
#include <endian.h>
#include <infiniband/mlx5dv.h>

#include "gda_harness.h"

namespace lamina::gda_test {
namespace {

static_assert(kWqeBytes == MLX5_SEND_WQE_BB && kWqeBytes == 1 << MLX5_SEND_WQE_SHIFT);
static_assert(kCqeBytes == sizeof(mlx5_cqe64) && kCqeBytes == sizeof(mlx5_err_cqe));
static_assert(kOpcodeRdmaWrite == MLX5_OPCODE_RDMA_WRITE && kCqUpdate == MLX5_WQE_CTRL_CQ_UPDATE);
static_assert(kInlineFlag == MLX5_INLINE_SEG && kSendRecord == MLX5_SND_DBR);
static_assert(kCqeOk == MLX5_CQE_REQ && kCqeError == MLX5_CQE_REQ_ERR && kCqeInvalid == MLX5_CQE_INVALID);
static_assert(kCqeOwnerMask == MLX5_CQE_OWNER_MASK);
static_assert(kLocalLengthError == MLX5_CQE_SYNDROME_LOCAL_LENGTH_ERR);
static_assert(kLocalOperationError == MLX5_CQE_SYNDROME_LOCAL_QP_OP_ERR);
static_assert(kLocalProtectionError == MLX5_CQE_SYNDROME_LOCAL_PROT_ERR);
static_assert(kFlushed == MLX5_CQE_SYNDROME_WR_FLUSH_ERR);
static_assert(kRemoteInvalidRequest == MLX5_CQE_SYNDROME_REMOTE_INVAL_REQ_ERR);
static_assert(kRemoteAccessError == MLX5_CQE_SYNDROME_REMOTE_ACCESS_ERR);
static_assert(kRetriesExceeded == MLX5_CQE_SYNDROME_TRANSPORT_RETRY_EXC_ERR);
static_assert(kReceiverNotReady == MLX5_CQE_SYNDROME_RNR_RETRY_EXC_ERR);
static_assert(kCqeTailOffset == offsetof(mlx5_cqe64, sop_drop_qpn));
static_assert(kCqeTailOffset + 4 == offsetof(mlx5_cqe64, wqe_counter));
static_assert(kCqeTailOffset + 7 == offsetof(mlx5_cqe64, op_own));
static_assert(kCqeSyndromeOffset == offsetof(mlx5_err_cqe, syndrome));
static_assert(kCqeVendorSyndromeOffset == offsetof(mlx5_err_cqe, vendor_err_synd));

struct PointerWqe {
  mlx5_wqe_ctrl_seg control;
  mlx5_wqe_raddr_seg remote;
  mlx5_wqe_data_seg data;
};

struct InlineWqe {
  mlx5_wqe_ctrl_seg control;
  mlx5_wqe_raddr_seg remote;
  mlx5_wqe_inl_data_seg data;
  unsigned char bytes[12];
};
static_assert(sizeof(PointerWqe) == sizeof(Wqe) && sizeof(InlineWqe) == sizeof(Wqe));

// Values in which every byte differs.
constexpr std::uint64_t kRemote = 0x0123456789abcdef, kLocal = 0xfedcba9876543210;
constexpr std::uint32_t kRkey = 0x1a2b3c4d, kLkey = 0x5e6f7081, kQpn = 0xabcdef, kBytes = 0x7a6b5c4d;
constexpr std::uint64_t kIndex = 0x5'4321;

template <typename Expected>
void SetHead(Expected& wqe, bool signaled) {
  mlx5dv_set_ctrl_seg(&wqe.control, kIndex & 0xffff, MLX5_OPCODE_RDMA_WRITE, 0, kQpn,
                      signaled ? MLX5_WQE_CTRL_CQ_UPDATE : 0, sizeof(Expected) / 16, 0, 0);
  wqe.remote.raddr = htobe64(kRemote);
  wqe.remote.rkey = htobe32(kRkey);
}

template <typename Expected>
void Compare(const Expected& expected, const Wqe& got, const std::string& what) {
  const auto* a = reinterpret_cast<const unsigned char*>(&expected);
  const auto* b = reinterpret_cast<const unsigned char*>(&got);
  for (std::size_t i = 0; i < sizeof(Wqe); ++i) {
    Check(a[i] == b[i], what + ", byte " + std::to_string(i) + ": expected " + std::to_string(a[i]) + ", got " +
                            std::to_string(b[i]));
  }
}

void Pointer() {
  for (const bool signaled : {false, true}) {
    PointerWqe expected{};
    SetHead(expected, signaled);
    mlx5dv_set_data_seg(&expected.data, kBytes, kLkey, kLocal);
    const Write write = WriteFrom(kRemote, kRkey, kLocal, kLkey, kBytes);
    Compare(expected, BuildWqe(write, kIndex, kQpn, signaled), "WQE with a pointer");
  }
}

void Inline() {
  InlineWqe expected{};
  SetHead(expected, true);
  expected.data.byte_count = htobe32(8 | MLX5_INLINE_SEG);
  std::memcpy(expected.bytes, &kLocal, 8);
  Compare(expected, BuildWqe(WriteValue(kRemote, kRkey, kLocal), kIndex, kQpn, true), "WQE with a value");
}

// As post_send_db of rdma-core: the record takes the low 16 bits, the doorbell the start of the last control segment.
void Doorbell() {
  PointerWqe wqe{};
  SetHead(wqe, true);
  std::uint64_t expected;
  std::memcpy(&expected, &wqe, sizeof(expected));
  Check(DoorbellValue(&wqe) == expected, "doorbell");
  Check(SendRecordValue(kIndex) == htobe32(kIndex & 0xffff), "doorbell record");
  Check(CqConsumerValue(0x5'0123'4567) == htobe32(0x234567), "consumer index of a completion queue has 24 bits");
}

void Completions() {
  World world({.adversarial = false, .log_num_wqes = 1});
  Channel& channel = world.AddChannel(8, 64);
  channel.writer.end.peer_rkey ^= 0x100;
  world.Start();
  // Three good WRITEs into the peer's header by its right key, one by a wrong key.
  const std::uint64_t at = channel.reader.nic_address;
  for (int i = 0; i < 4; ++i) {
    const Write write = WriteValue(at, channel.reader.keys.rkey ^ (i == 3 ? 0x100u : 0u), 1);
    Check(Post(world.a.queue, &write, 1, cuda::NowNs() + 10'000'000'000) == kOk, "post");
    Until([&] { return world.a.nic.doorbells() == static_cast<std::uint64_t>(i + 1); });
  }
  const auto* cqes = reinterpret_cast<mlx5_cqe64*>(world.a.cqes.data());
  const auto* last = reinterpret_cast<const std::uint64_t*>(&cqes[1].sop_drop_qpn);
  Until([&] { return CqeTail{cuda::LoadAcquireSystem(last)}.opcode() == MLX5_CQE_REQ_ERR; });
  world.a.nic.Stop();
  auto* good = const_cast<mlx5_cqe64*>(&cqes[0]);  // the third, on the second round
  Check(mlx5dv_get_cqe_opcode(good) == MLX5_CQE_REQ && mlx5dv_get_cqe_owner(good) == 1, "opcode and owner");
  Check(be16toh(good->wqe_counter) == 2, "wqe_counter");
  Check(be32toh(good->sop_drop_qpn) == (MLX5_OPCODE_RDMA_WRITE << 24 | world.a.queue.qpn), "opcode and queue pair");
  auto* bad = const_cast<mlx5_cqe64*>(&cqes[1]);
  const auto* error = reinterpret_cast<const mlx5_err_cqe*>(bad);
  Check(mlx5dv_get_cqe_opcode(bad) == MLX5_CQE_REQ_ERR, "opcode of an error");
  Check(error->syndrome == MLX5_CQE_SYNDROME_REMOTE_ACCESS_ERR && be16toh(error->wqe_counter) == 3, "syndrome");
  CqeTail tail{};
  std::memcpy(&tail.bytes, &good->sop_drop_qpn, sizeof(tail.bytes));
  Check(tail.opcode() == MLX5_CQE_REQ && tail.owner() == 1 && tail.wqe_counter() == 2, "what device code reads");
}

}  // namespace
}  // namespace lamina::gda_test

int main(int argc, char** argv) {
  using namespace lamina::gda_test;
  return RunCases({{"pointer", Pointer}, {"inline", Inline}, {"doorbell", Doorbell}, {"completions", Completions}},
                  argc, argv);
}
