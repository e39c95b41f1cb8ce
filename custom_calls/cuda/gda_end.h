// The host's side of gda channels: memory of both sides, the send queue as a GPU sees it, and failures in words.
//
// Written against the CUDA runtime and driver; not yet run on a machine with an mlx5 NIC.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "gda_layout.h"
#include "gda_proxy_thread.h"

namespace lamina::cuda::gda {

// Where a GPU is on the PCI bus, as "0000:1a:00.0". Throws std::runtime_error with CUDA's words if it is not there.
std::string PciBusId(int device);

// Where the driver of the NIC put a queue pair and its completion queue: addresses of this process.
struct DriverQueue {
  std::uint64_t wqes, record, doorbell, cqes, cq_record;
  std::uint32_t log_num_wqes, log_num_cqes, qpn;
};

// A queue pair that kernels of one GPU post to, directly or through the CPU proxy. Ends share it.
class GpuQueue {
 public:
  // Throws std::runtime_error with CUDA's words if the GPU cannot map even ordinary memory.
  GpuQueue(int device, const DriverQueue& queue);
  ~GpuQueue();
  GpuQueue(const GpuQueue&) = delete;
  GpuQueue& operator=(const GpuQueue&) = delete;

  // Waits until the NIC is done with what finished kernels left to the CPU proxy, if there is one.
  void Settle();
  // Ends all use of the driver's queues, which may be destroyed then. Close the ends first.
  void Close();
  // Whether the GPU cannot reach the NIC's doorbell.
  bool uses_proxy() const { return proxy_thread_ != nullptr; }
  void Describe(End& end) const;  // fills in queue, proxy and use_proxy
  int device() const { return device_; }

 private:
  bool MapForGpu(const DriverQueue& queue);
  void StartProxy(const DriverQueue& queue);
  void* Map(std::uint64_t address, std::uint64_t bytes, unsigned flags);  // null if the GPU cannot
  void Unmap();

  const int device_;
  std::vector<void*> mapped_;
  SendQueue queue_{};
  ProxyQueue proxy_{};
  QueueState* device_state_ = nullptr;
  std::unique_ptr<QueueState> host_state_;
  std::uint64_t* reserved_ = nullptr;
  void* pinned_ = nullptr;
  std::unique_ptr<ProxyThread> proxy_thread_;
};

struct GpuEndOptions {
  Role role;
  std::string peer;  // how errors call the other end
  std::uint32_t num_slots;
  std::uint64_t slot_bytes;
  double timeout_s;
};

// One end of a channel. First its region is made, to be registered with the NIC; then it is connected.
class GpuEnd {
 public:
  GpuEnd(int device, GpuEndOptions options);
  ~GpuEnd();
  GpuEnd(const GpuEnd&) = delete;
  GpuEnd& operator=(const GpuEnd&) = delete;

  std::uint64_t region() const { return reinterpret_cast<std::uint64_t>(region_); }
  std::uint64_t region_bytes() const { return RegionBytes(options_.num_slots, options_.slot_bytes); }
  // A dmabuf of the region, for ibv_reg_dmabuf_mr; the caller closes it. -1 if the driver has none.
  int ExportDmabuf() const;

  // `nic_address` is that by which the NIC knows the region, `peer_region` that by which the peer's knows its own.
  void Connect(std::shared_ptr<GpuQueue> queue, std::uint64_t nic_address, std::uint32_t lkey,
               std::uint64_t peer_region, std::uint32_t peer_rkey);
  // Ends every operation of both ends, now and later. Any thread may call it.
  void Abort();
  // Ends this end's operations. Kernels that start later, from a graph that outlives the end too, find it closed and touch
  // nothing. Waits, for a bounded time, until the NIC has delivered what was sent.
  void Close();
  std::string failure() const;

  std::int64_t id() const { return id_; }
  int device() const { return device_; }
  Role role() const { return options_.role; }
  bool connected() const { return queue_ != nullptr; }
  End* end() const { return end_; }

 private:
  bool NoKernelLeft();
  std::uint64_t DmabufBytes() const;

  const int device_;
  const GpuEndOptions options_;
  const std::int64_t id_;
  char* region_ = nullptr;
  End* end_ = nullptr;
  struct Pinned* pinned_ = nullptr;
  cudaStream_t stream_ = nullptr;  // waits for no other
  std::shared_ptr<GpuQueue> queue_;
  std::mutex mutex_;
  bool closed_ = false;
};

// The open ends of this process by number, which none has twice; null if there is none (any more).
std::shared_ptr<GpuEnd> FindEnd(std::int64_t id);
void RegisterEnd(std::shared_ptr<GpuEnd> end);
void UnregisterEnd(std::int64_t id);

}  // namespace lamina::cuda::gda
