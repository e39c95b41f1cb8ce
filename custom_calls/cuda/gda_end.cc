#include "gda_end.h"

#include <cuda.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

#include "gda_failure.h"
#include "gda_kernels.h"

namespace lamina::cuda::gda {

// What the host and the kernels of one end tell each other.
struct Pinned {
  FailureRecord record;
  alignas(kLine) std::uint64_t stop;
};

namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::chrono::microseconds kQueryInterval{200};
constexpr std::uint64_t kGpuPage = 65536;  // GPU memory is exported, and registered with a NIC, in whole ones
// Numbers of these ends start here, so that none is that of a channel of another kind.
constexpr std::int64_t kFirstId = std::int64_t{1} << 41;

void Require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

template <typename T>
T* AllocateDevice(std::uint64_t bytes, const char* what) {
  void* data = nullptr;
  Require(cudaMalloc(&data, bytes), what);
  Require(cudaMemset(data, 0, bytes), what);
  return static_cast<T*>(data);
}

template <typename T>
T* AllocatePinned(std::uint64_t bytes, const char* what) {
  void* data = nullptr;
  Require(cudaHostAlloc(&data, bytes, cudaHostAllocPortable | cudaHostAllocMapped), what);
  std::fill_n(static_cast<char*>(data), bytes, 0);
  return static_cast<T*>(data);
}

// Anything less and a sequence number could be seen before the payload it announces.
void RequireOrderedWrites(int device) {
  int ordering = 0;
  Require(cudaDeviceGetAttribute(&ordering, cudaDevAttrGPUDirectRDMAWritesOrdering, device), "asking the GPU");
  if (ordering >= cudaGPUDirectRDMAWritesOrderingOwner) return;
  throw std::runtime_error("GPU " + std::to_string(device) + " does not order GPUDirect RDMA writes for itself " +
                           "(ordering " + std::to_string(ordering) + ", needed 100 or more); use another kind");
}

// Memory of ends is used again but never given back: a graph that outlives its channel still looks there, and finds that
// the end is closed or that its number is another's.
class EndMemory {
 public:
  End* Take(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<End*>& free = free_[device];
    if (free.empty()) return AllocateDevice<End>(sizeof(End), "memory for the end of a channel");
    End* const end = free.back();
    free.pop_back();
    return end;
  }

  void GiveBack(int device, End* end) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_[device].push_back(end);
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<End*>> free_;  // by GPU
};

EndMemory& TheEndMemory() {
  static auto* memory = new EndMemory();
  return *memory;
}

}  // namespace

std::string PciBusId(int device) {
  char id[32];
  Require(cudaDeviceGetPCIBusId(id, sizeof(id), device), "asking where the GPU is");
  return id;
}

GpuQueue::GpuQueue(int device, const DriverQueue& queue) : device_(device) {
  if (queue.log_num_wqes > kMaxLogWqes || queue.log_num_cqes < queue.log_num_wqes) {
    throw std::invalid_argument("expected at most 2^15 WQEs and a completion queue of at least as many, got 2^" +
                                std::to_string(queue.log_num_wqes) + " and 2^" + std::to_string(queue.log_num_cqes));
  }
  Require(cudaSetDevice(device), "cudaSetDevice");
  queue_.log_num_wqes = queue.log_num_wqes;
  queue_.log_num_cqes = queue.log_num_cqes;
  queue_.qpn = queue.qpn;
  if (MapForGpu(queue)) return;
  cudaGetLastError();  // the refusal is dealt with
  Unmap();
  StartProxy(queue);
}

void GpuQueue::Settle() {
  if (proxy_thread_ != nullptr) proxy_thread_->Settle(NowNs() + kDrainNs);
}

void GpuQueue::Close() {
  proxy_thread_.reset();
  Unmap();
}

GpuQueue::~GpuQueue() {
  Close();
  cudaFree(device_state_);
  cudaFree(reserved_);
  cudaFreeHost(pinned_);
}

bool GpuQueue::MapForGpu(const DriverQueue& queue) {
  const auto wqe_bytes = std::uint64_t{kWqeBytes} << queue.log_num_wqes;
  const auto cqe_bytes = std::uint64_t{kCqeBytes} << queue.log_num_cqes;
  queue_.doorbell = static_cast<std::uint64_t*>(Map(queue.doorbell, 8, cudaHostRegisterIoMemory));
  if (queue_.doorbell == nullptr) return false;
  queue_.wqes = static_cast<char*>(Map(queue.wqes, wqe_bytes, 0));
  queue_.cqes = static_cast<char*>(Map(queue.cqes, cqe_bytes, 0));
  queue_.record = static_cast<std::uint32_t*>(Map(queue.record, 8, 0));
  queue_.cq_record = static_cast<std::uint32_t*>(Map(queue.cq_record, 8, 0));
  if (!queue_.wqes || !queue_.cqes || !queue_.record || !queue_.cq_record) return false;
  device_state_ = AllocateDevice<QueueState>(sizeof(QueueState), "memory for a send queue");
  queue_.state = device_state_;
  return true;
}

// Whole pages, some of which may be registered already for another of these structures.
void* GpuQueue::Map(std::uint64_t address, std::uint64_t bytes, unsigned flags) {
  const std::uint64_t begin = address / kPage * kPage;
  const std::uint64_t end = (address + bytes + kPage - 1) / kPage * kPage;
  const unsigned all = cudaHostRegisterPortable | cudaHostRegisterMapped | flags;
  const cudaError_t error = cudaHostRegister(reinterpret_cast<void*>(begin), end - begin, all);
  if (error == cudaSuccess) mapped_.push_back(reinterpret_cast<void*>(begin));
  if (error != cudaSuccess && error != cudaErrorHostMemoryAlreadyRegistered) return nullptr;
  void* on_gpu = nullptr;
  if (cudaHostGetDevicePointer(&on_gpu, reinterpret_cast<void*>(begin), 0) != cudaSuccess) return nullptr;
  return static_cast<char*>(on_gpu) + (address - begin);
}

void GpuQueue::Unmap() {
  for (void* const page : mapped_) cudaHostUnregister(page);
  mapped_.clear();
}

void GpuQueue::StartProxy(const DriverQueue& queue) {
  host_state_ = std::make_unique<QueueState>();
  queue_.wqes = reinterpret_cast<char*>(queue.wqes);
  queue_.cqes = reinterpret_cast<char*>(queue.cqes);
  queue_.record = reinterpret_cast<std::uint32_t*>(queue.record);
  queue_.cq_record = reinterpret_cast<std::uint32_t*>(queue.cq_record);
  queue_.doorbell = reinterpret_cast<std::uint64_t*>(queue.doorbell);
  queue_.state = host_state_.get();
  const auto entry_bytes = sizeof(ProxyEntry) << queue.log_num_wqes;
  auto* const memory = AllocatePinned<char>(sizeof(ProxyWords) + entry_bytes, "pinned memory for the CPU proxy");
  pinned_ = memory;
  proxy_.words = reinterpret_cast<ProxyWords*>(memory);
  proxy_.entries = reinterpret_cast<ProxyEntry*>(memory + sizeof(ProxyWords));
  proxy_.log_num_entries = queue.log_num_wqes;
  reserved_ = AllocateDevice<std::uint64_t>(sizeof(std::uint64_t), "memory for the CPU proxy");
  proxy_.reserved = reserved_;
  proxy_thread_ = std::make_unique<ProxyThread>(proxy_, queue_);
}

void GpuQueue::Describe(End& end) const {
  end.queue = queue_;
  end.proxy = proxy_;
  end.use_proxy = uses_proxy() ? 1 : 0;
}

GpuEnd::GpuEnd(int device, GpuEndOptions options)
    : device_(device), options_(std::move(options)), id_([] {
        static std::atomic<std::int64_t> next{kFirstId};
        return next.fetch_add(1);
      }()) {
  if (options_.slot_bytes % kLine != 0 || options_.slot_bytes > kMaxBytes - sizeof(SlotHeader)) {
    throw std::invalid_argument("expected slot_bytes to be a multiple of 64 below 2 GB, got " +
                                std::to_string(options_.slot_bytes));
  }
  Require(cudaSetDevice(device), "cudaSetDevice");
  RequireOrderedWrites(device);
  // CUDA loads kernels when they are first launched, for which it may wait for those that run, which wait for ours.
  Require(LoadKernels(), "loading the kernels");
  region_ = AllocateDevice<char>(DmabufBytes(), "memory for the slots of a channel");
  end_ = TheEndMemory().Take(device);
  pinned_ = AllocatePinned<Pinned>(sizeof(Pinned), "pinned memory for the end of a channel");
  Require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
}

GpuEnd::~GpuEnd() {
  Close();
  if (!NoKernelLeft()) return;  // better to keep the memory for good than to free what is in use
  cudaStreamDestroy(stream_);
  cudaFree(region_);
  cudaFreeHost(pinned_);
  TheEndMemory().GiveBack(device_, end_);
}

// Shuts the end to later kernels, also where the one that closes it could not run, and waits for those that were told to
// stop, which return within a moment.
bool GpuEnd::NoKernelLeft() {
  const std::uint64_t closed = 0;
  return cudaSetDevice(device_) == cudaSuccess &&
         cudaMemcpy(&end_->id, &closed, sizeof(closed), cudaMemcpyHostToDevice) == cudaSuccess &&
         cudaDeviceSynchronize() == cudaSuccess;
}

std::uint64_t GpuEnd::DmabufBytes() const { return (region_bytes() + kGpuPage - 1) / kGpuPage * kGpuPage; }

int GpuEnd::ExportDmabuf() const {
  // By way of the runtime, so that this module loads on a machine without a driver.
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuMemGetHandleForAddressRange", &found, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return -1;
  const auto get_handle = reinterpret_cast<decltype(&cuMemGetHandleForAddressRange)>(found);
  int fd = -1;
  const auto address = reinterpret_cast<CUdeviceptr>(region_);
  const CUresult got = get_handle(&fd, address, DmabufBytes(), CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0);
  return got == CUDA_SUCCESS ? fd : -1;
}

void GpuEnd::Connect(std::shared_ptr<GpuQueue> queue, std::uint64_t nic_address, std::uint32_t lkey,
                     std::uint64_t peer_region, std::uint32_t peer_rkey) {
  if (queue->device() != device_) {
    throw std::invalid_argument("expected a queue of GPU " + std::to_string(device_) + ", got one of GPU " +
                                std::to_string(queue->device()));
  }
  End end{};
  end.id = static_cast<std::uint64_t>(id_);
  end.region = region_;
  end.nic_region = nic_address;
  end.peer_region = peer_region;
  end.slot_bytes = options_.slot_bytes;
  end.timeout_ns = static_cast<std::uint64_t>(options_.timeout_s * 1e9);
  end.stop = &pinned_->stop;
  end.record = &pinned_->record;
  end.lkey = lkey;
  end.peer_rkey = peer_rkey;
  end.num_slots = options_.num_slots;
  end.role = options_.role;
  queue->Describe(end);
  Require(cudaMemcpy(end_, &end, sizeof(end), cudaMemcpyHostToDevice), "setting up the end of a channel");
  queue_ = std::move(queue);
}

// Running kernels see the word; the peer is told by a kernel. Not after a close, when the queue may be gone.
void GpuEnd::Abort() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (LoadRelaxedSystem(&pinned_->stop) != 0) return;
  StoreReleaseSystem(&pinned_->stop, kStopAborted);
  if (connected() && cudaSetDevice(device_) == cudaSuccess) LaunchAbort(end_, stream_);
}

// After a close the memory may go, so the kernel that tells the peer is awaited.
void GpuEnd::Close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (std::exchange(closed_, true)) return;
  if (LoadRelaxedSystem(&pinned_->stop) == 0) StoreReleaseSystem(&pinned_->stop, kStopClosed);
  if (!connected() || cudaSetDevice(device_) != cudaSuccess) return;
  LaunchClose(end_, stream_);
  const std::uint64_t deadline = NowNs() + 2 * kDrainNs;
  while (cudaStreamQuery(stream_) == cudaErrorNotReady && NowNs() < deadline) {
    std::this_thread::sleep_for(kQueryInterval);
  }
  queue_->Settle();
}

std::string GpuEnd::failure() const {
  return FailureText(pinned_->record, options_.role, options_.peer, options_.timeout_s);
}

namespace {

struct Ends {
  std::mutex mutex;
  std::map<std::int64_t, std::shared_ptr<GpuEnd>> by_id;
};

// Never destroyed: a program may still run in another thread while the process exits.
Ends& TheEnds() {
  static auto* ends = new Ends();
  return *ends;
}

}  // namespace

std::shared_ptr<GpuEnd> FindEnd(std::int64_t id) {
  Ends& ends = TheEnds();
  const std::lock_guard<std::mutex> lock(ends.mutex);
  const auto found = ends.by_id.find(id);
  return found == ends.by_id.end() ? nullptr : found->second;
}

void RegisterEnd(std::shared_ptr<GpuEnd> end) {
  Ends& ends = TheEnds();
  const std::lock_guard<std::mutex> lock(ends.mutex);
  const std::int64_t id = end->id();
  ends.by_id[id] = std::move(end);
}

void UnregisterEnd(std::int64_t id) {
  std::shared_ptr<GpuEnd> last;  // freed after the lock is released
  Ends& ends = TheEnds();
  const std::lock_guard<std::mutex> lock(ends.mutex);
  const auto found = ends.by_id.find(id);
  if (found == ends.by_id.end()) return;
  last = std::move(found->second);
  ends.by_id.erase(found);
}

}  // namespace lamina::cuda::gda
