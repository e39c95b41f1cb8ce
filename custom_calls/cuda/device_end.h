// The host's side of an end of a channel that kernels operate: it sets the end up, watches over the peer, ends waits,
// and puts into words what a kernel left on record.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "layout.h"
#include "shm_channel.h"

namespace lamina::cuda {

// Where the slots are: in memory of the host that the GPU maps, or in memory of the reader's GPU.
enum class Kind { kHost, kIpc };

// How many GPUs there are, or why there are none, for people to read.
struct Devices {
  int count = 0;
  std::string why_none;
};
Devices FindDevices();

struct EndPlace {
  Kind kind;
  int device;  // CUDA's number of the GPU in this process
};

class DeviceEnd : public std::enable_shared_from_this<DeviceEnd> {
 public:
  // Throws std::system_error if the memory is not to be had, std::runtime_error with CUDA's words if the GPU refuses.
  static std::shared_ptr<DeviceEnd> Create(EndPlace place, EndOptions options, std::uint32_t num_slots,
                                           std::uint64_t slot_bytes);
  // As ShmChannel::Attach throws, and as Create.
  static std::shared_ptr<DeviceEnd> Attach(EndPlace place, EndOptions options, const std::string& path,
                                           std::uint32_t num_slots, std::uint64_t slot_bytes);

  // Whether a kernel may be launched. Waits for the peer where its memory is needed, within the timeout.
  Status Ready(std::int32_t tag);

  // Ends every operation of both ends, now and later. Any thread may call it.
  void Abort() { ring_->Abort(); }
  // Ends this end's operations. Its memory goes once no kernel can use it any more; nobody waits for that.
  void Close();
  // One look at what only the host can see, by one thread.
  void Watch();

  std::uint64_t id() const { return id_; }
  int device() const { return place_.device; }
  End* end() const { return end_; }
  std::string path() const { return ring_->path(); }
  std::uint32_t peer_pid() const { return ring_->peer_pid(); }
  // The first failure, from when the host could see it.
  Status failure();

 private:
  DeviceEnd(EndPlace place, EndOptions options, std::shared_ptr<ShmChannel> ring, std::uint32_t num_slots,
            std::uint64_t slot_bytes);
  static std::shared_ptr<DeviceEnd> Start(std::shared_ptr<DeviceEnd> end);

  void SetUp();
  void OfferSlots();
  void OpenSlots();
  void WriteFixedPart(std::uint64_t id);
  Status Recorded() const;
  void FreeAfterLastKernel();
  struct Offer* offer() const;
  Role PeerRole() const { return options_.role == Role::kWriter ? Role::kReader : Role::kWriter; }

  const EndPlace place_;
  const EndOptions options_;
  const std::shared_ptr<ShmChannel> ring_;
  const std::uint32_t num_slots_;
  const std::uint64_t slot_bytes_;
  const std::uint64_t id_;

  End* end_ = nullptr;               // in memory of the GPU
  FailureRecord* record_ = nullptr;  // in pinned memory
  char* slots_ = nullptr;            // an address of the GPU
  enum class Slots { kNone, kOfRing, kOwned, kImported, kShared } slots_kind_ = Slots::kNone;
  std::atomic<bool> connected_{false};
  std::atomic<bool> closed_{false};
  std::mutex mutex_;
  Status failure_;
};

// The ends of GPUs of this process by number. A number is that of no other channel, and none is used twice. Null if there
// is no such end (any more).
std::shared_ptr<DeviceEnd> FindEnd(std::int64_t id);

}  // namespace lamina::cuda
