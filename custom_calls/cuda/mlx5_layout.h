// The bytes that an mlx5 NIC reads and writes: send queue entries (WQEs), doorbells, completion queue entries (CQEs).
//
// Layouts as in rdma-core's infiniband/mlx5dv.h (struct mlx5_wqe_ctrl_seg, mlx5_wqe_raddr_seg, mlx5_wqe_data_seg,
// mlx5_cqe64, mlx5_err_cqe), which tests/transport/gda_layout.cc compares with these field by field. All multi-byte
// fields are big-endian. Every WQE here is an RDMA WRITE of one WQEBB (64 bytes): control, remote address and either
// one data pointer or a few bytes inline.
#pragma once

#include <cstdint>

#include "ptx.h"

namespace lamina::cuda::gda {

inline constexpr std::uint32_t kWqeBytes = 64;  // MLX5_SEND_WQE_BB
inline constexpr std::uint32_t kCqeBytes = 64;
inline constexpr std::uint32_t kWqeVecs = kWqeBytes / sizeof(Vec16);
inline constexpr std::uint32_t kSegments = 3;  // of 16 bytes each, as the `ds` field counts them

inline constexpr std::uint32_t kOpcodeRdmaWrite = 0x08;    // MLX5_OPCODE_RDMA_WRITE
inline constexpr std::uint32_t kCqUpdate = 2 << 2;         // MLX5_WQE_CTRL_CQ_UPDATE in fm_ce_se: completes with a CQE
inline constexpr std::uint32_t kInlineFlag = 0x80000000u;  // MLX5_INLINE_SEG in byte_count
inline constexpr std::uint32_t kMaxBytes = 0x7fffffffu;    // of one WRITE: byte_count has 31 bits
inline constexpr std::uint32_t kSendRecord = 1;            // MLX5_SND_DBR: index into a queue pair's doorbell record
inline constexpr std::uint32_t kCqConsumerRecord = 0;      // MLX5_CQ_SET_CI: index into a CQ's doorbell record

inline constexpr std::uint32_t kCqeOk = 0;            // MLX5_CQE_REQ
inline constexpr std::uint32_t kCqeError = 13;        // MLX5_CQE_REQ_ERR
inline constexpr std::uint32_t kCqeInvalid = 15;      // MLX5_CQE_INVALID: never written yet
inline constexpr std::uint32_t kCqeOwnerMask = 1;     // MLX5_CQE_OWNER_MASK

// Syndromes of error CQEs (enum MLX5_CQE_SYNDROME_*).
inline constexpr std::uint32_t kLocalLengthError = 0x01;
inline constexpr std::uint32_t kLocalOperationError = 0x02;
inline constexpr std::uint32_t kLocalProtectionError = 0x04;
inline constexpr std::uint32_t kFlushed = 0x05;
inline constexpr std::uint32_t kRemoteInvalidRequest = 0x12;
inline constexpr std::uint32_t kRemoteAccessError = 0x13;
inline constexpr std::uint32_t kRetriesExceeded = 0x15;
inline constexpr std::uint32_t kReceiverNotReady = 0x16;

// One RDMA WRITE as its poster sees it.
struct alignas(16) Write {
  std::uint64_t remote = 0;  // address by which the peer's NIC knows the target
  std::uint64_t local = 0;   // address by which ours knows the source; if inline, the 8 bytes themselves
  std::uint32_t bytes = 0;   // 1 .. kMaxBytes; 0 bytes would mean 2 GB to the NIC
  std::uint32_t rkey = 0;
  std::uint32_t lkey = 0;
  std::uint32_t is_inline = 0;
};
static_assert(sizeof(Write) == 32);

LAMINA_DEVICE Write WriteFrom(std::uint64_t remote, std::uint32_t rkey, std::uint64_t local, std::uint32_t lkey,
                              std::uint32_t bytes) {
  Write write;
  write.remote = remote;
  write.rkey = rkey;
  write.local = local;
  write.lkey = lkey;
  write.bytes = bytes;
  return write;
}

// Eight bytes that travel in the WQE itself, in the byte order of the host.
LAMINA_DEVICE Write WriteValue(std::uint64_t remote, std::uint32_t rkey, std::uint64_t value) {
  Write write;
  write.remote = remote;
  write.rkey = rkey;
  write.local = value;
  write.bytes = sizeof(value);
  write.is_inline = 1;
  return write;
}

struct Wqe {
  Vec16 segment[kSegments];
};

// `index` is the position of the WQE since the queue was made; the NIC sees its low 16 bits.
LAMINA_DEVICE Wqe BuildWqe(const Write& write, std::uint64_t index, std::uint32_t qpn, bool signaled) {
  Wqe wqe;
  Vec16& control = wqe.segment[0];
  control.word[0] = SwapBytes32((static_cast<std::uint32_t>(index) & 0xffffu) << 8 | kOpcodeRdmaWrite);
  control.word[1] = SwapBytes32(qpn << 8 | kSegments);
  control.word[2] = SwapBytes32(signaled ? kCqUpdate : 0u);  // signature, stream: 0; fm_ce_se is the last byte
  control.word[3] = 0;
  Vec16& remote = wqe.segment[1];
  remote.word[0] = SwapBytes32(static_cast<std::uint32_t>(write.remote >> 32));
  remote.word[1] = SwapBytes32(static_cast<std::uint32_t>(write.remote));
  remote.word[2] = SwapBytes32(write.rkey);
  remote.word[3] = 0;
  Vec16& data = wqe.segment[2];
  const auto low = static_cast<std::uint32_t>(write.local);
  const auto high = static_cast<std::uint32_t>(write.local >> 32);
  if (write.is_inline != 0) {
    data.word[0] = SwapBytes32(write.bytes | kInlineFlag);
    data.word[1] = low;
    data.word[2] = high;
    data.word[3] = 0;
  } else {
    data.word[0] = SwapBytes32(write.bytes);
    data.word[1] = SwapBytes32(write.lkey);
    data.word[2] = SwapBytes32(high);
    data.word[3] = SwapBytes32(low);
  }
  return wqe;
}

// What the doorbell record says once `producer` WQEs have been posted.
LAMINA_DEVICE std::uint32_t SendRecordValue(std::uint64_t producer) {
  return SwapBytes32(static_cast<std::uint32_t>(producer) & 0xffffu);
}

// What rings the doorbell: the first 8 bytes of the control segment of the last WQE posted, as they lie in memory.
LAMINA_DEVICE std::uint64_t DoorbellValue(const void* last_wqe) {
  return *static_cast<const std::uint64_t*>(last_wqe);
}

LAMINA_DEVICE std::uint32_t CqConsumerValue(std::uint64_t consumer) {
  return SwapBytes32(static_cast<std::uint32_t>(consumer) & 0xffffffu);
}

// The last 8 bytes of a CQE, which the NIC writes last: sop_drop_qpn, wqe_counter, signature, op_own.
struct CqeTail {
  std::uint64_t bytes;

  LAMINA_DEVICE std::uint32_t opcode() const { return static_cast<std::uint32_t>(bytes >> 60); }
  LAMINA_DEVICE std::uint32_t owner() const { return static_cast<std::uint32_t>(bytes >> 56) & kCqeOwnerMask; }
  LAMINA_DEVICE std::uint16_t wqe_counter() const {
    return SwapBytes16(static_cast<std::uint16_t>(bytes >> 32));
  }
};

inline constexpr std::uint32_t kCqeTailOffset = 56;
inline constexpr std::uint32_t kCqeSyndromeOffset = 55;        // mlx5_err_cqe::syndrome
inline constexpr std::uint32_t kCqeVendorSyndromeOffset = 54;  // mlx5_err_cqe::vendor_err_synd

}  // namespace lamina::cuda::gda
