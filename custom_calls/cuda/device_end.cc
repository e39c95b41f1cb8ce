#include "cuda/device_end.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <map>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/transport.h"

namespace lamina::cuda {

// What a reader leaves in the only slot of a kIpc channel's ring, so that the writer can reach its memory.
struct Offer {
  std::uint32_t num_slots;  // as the creator made the channel
  std::uint32_t pid;
  std::uint64_t slot_bytes;
  std::uint64_t address;  // in the process `pid`
  std::int32_t device;    // there
  std::atomic<std::uint32_t> made;  // stored last
  cudaIpcMemHandle_t handle;
};

namespace {

// Above all numbers of channels that the CPU operates.
constexpr std::uint64_t kFirstId = std::uint64_t{1} << 40;
constexpr std::chrono::milliseconds kWatchInterval{5};
constexpr std::chrono::microseconds kConnectInterval{200};
constexpr double kLongestTimeoutS = 1e9;  // about 30 years; more would not go into nanoseconds
constexpr int kFreeAttempts = 100;
constexpr std::chrono::milliseconds kFreeInterval{50};
constexpr std::size_t kEndsPerChunk = 64;

void Require(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it again
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// Makes a GPU the calling thread's, and gives it back the one it had.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    Require(cudaGetDevice(&before_), "cannot ask which GPU is in use");
    Require(cudaSetDevice(device), "cannot use GPU " + std::to_string(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// What all ends on one GPU share. Memory of ends is used again but never given back: a graph that outlives its channel
// still looks there, and finds that the number is another's.
class Gpu {
 public:
  struct Places {
    End* end;
    FailureRecord* record;
  };

  // Call it with the GPU in use.
  Gpu() {
    Require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cannot make a stream");
    // CUDA loads kernels when they are first launched, for which it may wait for those that run, which wait for ours.
    Require(LoadKernels(), "cannot load the kernels; this build has code for compute capability 9.0 and above");
  }

  Places Take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) Allocate();
    const Places taken = free_.back();
    free_.pop_back();
    std::memset(static_cast<void*>(taken.record), 0, sizeof(FailureRecord));
    return taken;
  }

  void GiveBack(Places places) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(places);
  }

  // Does not wait for kernels that run.
  void Write(void* to, const void* from, std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "cannot write to memory of the GPU");
    Require(cudaStreamSynchronize(stream_), "cannot write to memory of the GPU");
  }

  void Zero(void* to, std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Require(cudaMemsetAsync(to, 0, bytes, stream_), "cannot clear memory of the GPU");
    Require(cudaStreamSynchronize(stream_), "cannot clear memory of the GPU");
  }

 private:
  void Allocate() {
    void* ends = nullptr;
    void* records = nullptr;
    Require(cudaMalloc(&ends, kEndsPerChunk * sizeof(End)), "cannot reserve memory of the GPU for ends of channels");
    Require(cudaHostAlloc(&records, kEndsPerChunk * sizeof(FailureRecord), cudaHostAllocPortable | cudaHostAllocMapped),
            "cannot reserve pinned memory for failures of channels");
    for (std::size_t i = 0; i < kEndsPerChunk; ++i) {
      free_.push_back({static_cast<End*>(ends) + i, static_cast<FailureRecord*>(records) + i});
    }
  }

  std::mutex mutex_;
  cudaStream_t stream_ = nullptr;
  std::vector<Places> free_;
};

// Never destroyed, like all that programs may still use while the process exits.
Gpu& GpuOf(int device) {
  static auto* mutex = new std::mutex();
  static auto* gpus = new std::map<int, std::unique_ptr<Gpu>>();
  const std::lock_guard<std::mutex> lock(*mutex);
  std::unique_ptr<Gpu>& gpu = (*gpus)[device];
  if (gpu == nullptr) gpu = std::make_unique<Gpu>();
  return *gpu;
}

// The ends by number, and the thread that watches over them.
class Watcher {
 public:
  std::uint64_t NextId() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return next_id_++;
  }

  void Add(const std::shared_ptr<DeviceEnd>& end) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ends_[end->id()] = end;
    if (!started_) std::thread([this] { Run(); }).detach();
    started_ = true;
    changed_.notify_one();
  }

  void Remove(std::uint64_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ends_.erase(id);
  }

  std::shared_ptr<DeviceEnd> Find(std::uint64_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = ends_.find(id);
    return found == ends_.end() ? nullptr : found->second;
  }

 private:
  void Run() {
    while (true) {
      std::vector<std::shared_ptr<DeviceEnd>> ends;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return !ends_.empty(); });
        for (const auto& [id, end] : ends_) ends.push_back(end);
      }
      for (const auto& end : ends) end->Watch();
      ends.clear();
      std::this_thread::sleep_for(kWatchInterval);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::uint64_t, std::shared_ptr<DeviceEnd>> ends_;
  std::uint64_t next_id_ = kFirstId;
  bool started_ = false;
};

Watcher& TheWatcher() {
  static auto* watcher = new Watcher();
  return *watcher;
}

Code CodeOf(Reason reason) {
  switch (reason) {
    case Reason::kTimeout:
      return Code::kDeadlineExceeded;
    case Reason::kPeerDied:
    case Reason::kPeerClosed:
      return Code::kUnavailable;
    case Reason::kPeerAborted:
    case Reason::kAborted:
    case Reason::kClosed:
      return Code::kAborted;
    case Reason::kNoChannel:
      return Code::kOutOfRange;
    default:
      return Code::kFailedPrecondition;
  }
}

// Why an operation failed, in the words that the CPU's channels use.
std::string Explain(Reason reason, const FailureRecord& record, const EndOptions& options, std::uint64_t slot_bytes) {
  switch (reason) {
    case Reason::kTimeout:
      return TimeoutReason(options.role, options.timeout_s) + kPeerLives;
    case Reason::kPeerDied:
      return kPeerDied;
    case Reason::kPeerAborted:
      return kPeerAborted;
    case Reason::kPeerClosed:
      return kPeerClosed;
    case Reason::kAborted:
      return kSelfAborted;
    case Reason::kClosed:
      return kSelfClosed;
    case Reason::kSequence:
      return Mismatch("sequence", static_cast<std::int64_t>(record.expected_sequence),
                      static_cast<std::int64_t>(record.got_sequence));
    case Reason::kMessage:
      return Difference(record.expected, record.got);
    case Reason::kTooLarge:
      return TooLarge(record.expected.payload_bytes, slot_bytes);
    default:
      return "a kernel gave a reason that the host does not know: " + std::to_string(static_cast<int>(reason));
  }
}

void RequireSame(const char* what, std::uint64_t expected, std::uint64_t got, const std::string& path) {
  if (expected == got) return;
  throw std::invalid_argument("the ring at " + path + " has another " + what + ": expected " +
                              std::to_string(expected) + ", got " + std::to_string(got));
}

}  // namespace

Devices FindDevices() {
  Devices devices;
  const cudaError_t error = cudaGetDeviceCount(&devices.count);
  if (error == cudaSuccess) return devices;
  cudaGetLastError();
  devices.count = 0;
  devices.why_none = cudaGetErrorString(error);
  return devices;
}

DeviceEnd::DeviceEnd(EndPlace place, EndOptions options, std::shared_ptr<ShmChannel> ring, std::uint32_t num_slots,
                     std::uint64_t slot_bytes)
    : place_(place),
      options_(std::move(options)),
      ring_(std::move(ring)),
      num_slots_(num_slots),
      slot_bytes_(slot_bytes),
      id_(TheWatcher().NextId()) {}

std::shared_ptr<DeviceEnd> DeviceEnd::Create(EndPlace place, EndOptions options, std::uint32_t num_slots,
                                             std::uint64_t slot_bytes) {
  options.polled = true;
  slot_bytes = AlignToLine(slot_bytes);
  const bool host = place.kind == Kind::kHost;
  const auto ring = ShmChannel::Create(options, host ? num_slots : 1, host ? slot_bytes : sizeof(Offer));
  const std::shared_ptr<DeviceEnd> end(new DeviceEnd(place, std::move(options), ring, num_slots, slot_bytes));
  if (!host) {
    end->offer()->num_slots = num_slots;
    end->offer()->slot_bytes = slot_bytes;
  }
  return Start(end);
}

std::shared_ptr<DeviceEnd> DeviceEnd::Attach(EndPlace place, EndOptions options, const std::string& path,
                                             std::uint32_t num_slots, std::uint64_t slot_bytes) {
  const bool host = place.kind == Kind::kHost;
  const auto ring =
      ShmChannel::Attach(options, path, host ? num_slots : 1, host ? slot_bytes : AlignToLine(sizeof(Offer)));
  const std::shared_ptr<DeviceEnd> end(new DeviceEnd(place, std::move(options), ring, num_slots, slot_bytes));
  if (!host) {
    RequireSame("number of slots", num_slots, end->offer()->num_slots, path);
    RequireSame("slot size in bytes", slot_bytes, end->offer()->slot_bytes, path);
  }
  return Start(end);
}

std::shared_ptr<DeviceEnd> DeviceEnd::Start(std::shared_ptr<DeviceEnd> end) {
  try {
    end->SetUp();
  } catch (...) {
    cudaHostUnregister(end->ring_->memory());  // or it would be unmapped under CUDA's feet
    cudaGetLastError();
    throw;
  }
  TheWatcher().Add(end);
  return end;
}

Offer* DeviceEnd::offer() const {
  return reinterpret_cast<Offer*>(ring_->memory() + sizeof(RingHeader) + sizeof(SlotHeader));
}

void DeviceEnd::SetUp() {
  const DeviceGuard guard(place_.device);
  const std::uint64_t bytes = RingBytes(ring_->num_slots(), ring_->slot_bytes());
  Require(cudaHostRegister(ring_->memory(), bytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
          "cannot map " + std::to_string(bytes) + " bytes of shared memory into GPU " + std::to_string(place_.device));
  const Gpu::Places places = GpuOf(place_.device).Take();
  end_ = places.end;
  record_ = places.record;
  if (place_.kind == Kind::kHost) {
    void* mapped = nullptr;
    Require(cudaHostGetDevicePointer(&mapped, ring_->memory(), 0), "cannot address shared memory from the GPU");
    slots_ = static_cast<char*>(mapped) + sizeof(RingHeader);
    slots_kind_ = Slots::kOfRing;
    connected_ = true;
  } else if (options_.role == Role::kReader) {
    OfferSlots();
    connected_ = true;
  }
  End end{};
  GpuOf(place_.device).Write(end_, &end, sizeof(end));
  WriteFixedPart(id_);
  if (!connected_) OpenSlots();
}

// The reader's part: the slots lie in the memory of its GPU, where polling is cheap.
void DeviceEnd::OfferSlots() {
  void* memory = nullptr;
  const std::uint64_t bytes = num_slots_ * SlotStride(slot_bytes_);
  Require(cudaMalloc(&memory, bytes),
          "cannot reserve " + std::to_string(bytes) + " bytes of memory of GPU " + std::to_string(place_.device));
  slots_ = static_cast<char*>(memory);
  slots_kind_ = Slots::kOwned;
  GpuOf(place_.device).Zero(memory, bytes);
  Offer& offer = *this->offer();
  offer.pid = static_cast<std::uint32_t>(getpid());
  offer.address = reinterpret_cast<std::uint64_t>(memory);
  offer.device = place_.device;
  Require(cudaIpcGetMemHandle(&offer.handle, memory), "cannot export memory of the GPU to other processes");
  offer.made.store(1, std::memory_order_release);
}

// The writer's part, once the reader has made its offer.
void DeviceEnd::OpenSlots() {
  const Offer& offer = *this->offer();
  if (offer.made.load(std::memory_order_acquire) == 0) return;
  void* memory = nullptr;
  if (offer.pid == static_cast<std::uint32_t>(getpid())) {
    memory = reinterpret_cast<void*>(offer.address);
    slots_kind_ = Slots::kShared;
    if (offer.device != place_.device) {
      const cudaError_t error = cudaDeviceEnablePeerAccess(offer.device, 0);
      if (error != cudaErrorPeerAccessAlreadyEnabled) {
        Require(error, "GPU " + std::to_string(place_.device) + " cannot reach GPU " + std::to_string(offer.device) +
                           "; use transport='cuda_host'");
      }
      cudaGetLastError();
    }
  } else {
    Require(cudaIpcOpenMemHandle(&memory, offer.handle, cudaIpcMemLazyEnablePeerAccess),
            "cannot open the memory of the GPU of " + options_.peer +
                ", which must be on this host, visible here and in reach of GPU " + std::to_string(place_.device) +
                "; else use transport='cuda_host'");
    slots_kind_ = Slots::kImported;
  }
  slots_ = static_cast<char*>(memory);
  WriteFixedPart(id_);
  connected_ = true;
}

// All that kernels do not change. No kernel may use the end meanwhile, but to find that it is closed.
void DeviceEnd::WriteFixedPart(std::uint64_t id) {
  End end{};
  end.id = id;
  void* mapped = nullptr;
  Require(cudaHostGetDevicePointer(&mapped, ring_->memory(), 0), "cannot address shared memory from the GPU");
  end.ring = static_cast<RingHeader*>(mapped);
  Require(cudaHostGetDevicePointer(&mapped, record_, 0), "cannot address pinned memory from the GPU");
  end.record = static_cast<FailureRecord*>(mapped);
  end.slots = slots_;
  end.slot_bytes = slot_bytes_;
  end.timeout_ns = static_cast<std::uint64_t>(std::min(options_.timeout_s, kLongestTimeoutS) * 1e9);
  end.num_slots = num_slots_;
  end.role = options_.role;
  GpuOf(place_.device).Write(end_, &end, offsetof(End, next));
}

Status DeviceEnd::Ready(std::int32_t tag) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(options_.timeout_s);
  while (true) {
    if (Status status = failure(); !status.ok()) return status;
    const std::string operation = OperationName(options_.role, tag);
    if (closed_) return {Code::kAborted, operation + " failed: " + kSelfClosed};
    if (connected_) return {};
    const Stop stop = StopOf(options_.role, ring_->ring()->stop.load());
    const bool late = std::chrono::steady_clock::now() > deadline;
    if (stop.reason != Reason::kNone || late) {
      const std::string why = late ? "the peer has offered no memory of its GPU in time"
                                   : Explain(stop.reason, FailureRecord{}, options_, slot_bytes_);
      const std::lock_guard<std::mutex> lock(mutex_);
      failure_ = {late ? Code::kDeadlineExceeded : CodeOf(stop.reason),
                  operation + " to " + PeerName(options_.peer, peer_pid()) + " failed: " + why};
      return failure_;
    }
    std::this_thread::sleep_for(kConnectInterval);
  }
}

void DeviceEnd::Watch() {
  if (closed_) return;
  if (!connected_) {
    try {
      const DeviceGuard guard(place_.device);
      OpenSlots();
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (failure_.ok()) failure_ = {Code::kFailedPrecondition, error.what()};
    }
  }
  const std::uint32_t died = DiedBit(PeerRole());
  if ((ring_->ring()->stop.load() & died) == 0 && ring_->PeerDied()) ring_->Stop(died);
  failure();
}

Status DeviceEnd::failure() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failure_.ok() && record_ != nullptr) failure_ = Recorded();
  // The kernel cannot tell the peer: it makes no read-modify-write on memory of the host.
  if (!failure_.ok() && !closed_) ring_->Abort();
  return failure_;
}

Status DeviceEnd::Recorded() const {
  const std::uint32_t found = __atomic_load_n(&record_->reason, __ATOMIC_ACQUIRE);
  if (found == 0) return {};
  const auto reason = static_cast<Reason>(found);
  const Message& message = record_->expected;
  if (reason == Reason::kNoChannel) {
    return {CodeOf(reason), NoChannel(options_.role, message, static_cast<std::size_t>(record_->got.batch))};
  }
  return {CodeOf(reason), FailureText(options_.role, message, PeerName(options_.peer, peer_pid()),
                                      Explain(reason, *record_, options_, slot_bytes_))};
}

void DeviceEnd::Close() {
  if (closed_.exchange(true)) return;
  ring_->Close();
  TheWatcher().Remove(id_);
  // In a thread of its own, because it waits for the GPU, perhaps for kernels that wait for other channels.
  std::thread([self = shared_from_this()] { self->FreeAfterLastKernel(); }).detach();
}

void DeviceEnd::FreeAfterLastKernel() try {
  const DeviceGuard guard(place_.device);
  WriteFixedPart(0);
  for (int attempt = 0; cudaDeviceSynchronize() != cudaSuccess; ++attempt) {
    cudaGetLastError();
    if (attempt == kFreeAttempts) return;  // better to keep the memory for good than to free what is in use
    std::this_thread::sleep_for(kFreeInterval);
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (failure_.ok()) failure_ = Recorded();
    GpuOf(place_.device).GiveBack({end_, std::exchange(record_, nullptr)});
  }
  if (slots_kind_ == Slots::kOwned) cudaFree(slots_);
  if (slots_kind_ == Slots::kImported) cudaIpcCloseMemHandle(slots_);
  cudaHostUnregister(ring_->memory());
  cudaGetLastError();
} catch (const std::exception&) {
  // The GPU has failed, or the process is exiting; either way there is nothing left to free.
}

std::shared_ptr<DeviceEnd> FindEnd(std::int64_t id) { return TheWatcher().Find(static_cast<std::uint64_t>(id)); }

}  // namespace lamina::cuda
