// The host's side of the ends of `gda` channels, over software NICs and over a CUDA whose memory is the host's and whose
// kernels run where they are launched. AddressSanitizer sees what a kernel touches after it was freed.
#include "gda_end.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "gda_harness.h"
#include "gda_kernels.h"

// --- In place of the CUDA runtime -----------------------------------------------------------------------------------

namespace {

bool doorbell_in_reach = true;
bool kernels_run = true;

cudaError_t Allocate(void** data, std::size_t bytes) {
  *data = std::aligned_alloc(lamina::kLine, lamina::AlignToLine(bytes));
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t Free(void* data) {
  std::free(data);
  return cudaSuccess;
}

}  // namespace

extern "C" {
cudaError_t cudaMalloc(void** data, std::size_t bytes) { return Allocate(data, bytes); }
cudaError_t cudaFree(void* data) { return Free(data); }
cudaError_t cudaHostAlloc(void** data, std::size_t bytes, unsigned) { return Allocate(data, bytes); }
cudaError_t cudaFreeHost(void* data) { return Free(data); }
cudaError_t cudaMemset(void* data, int value, std::size_t bytes) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void*, std::size_t, unsigned flags) {
  const bool refused = (flags & cudaHostRegisterIoMemory) != 0 && !doorbell_in_reach;
  return refused ? cudaErrorNotPermitted : cudaSuccess;
}
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
cudaError_t cudaHostGetDevicePointer(void** on_gpu, void* data, unsigned) {
  *on_gpu = data;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cudaGPUDirectRDMAWritesOrderingOwner;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char*, int, int) { return cudaErrorNotSupported; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of CUDA"; }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void**, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
  return cudaErrorNotSupported;
}
}

namespace lamina::cuda::gda {

cudaError_t LoadKernels() { return cudaSuccess; }
cudaError_t LaunchAbort(End* end, cudaStream_t) {
  if (kernels_run) AbortEnd(*end);
  return cudaSuccess;
}
cudaError_t LaunchClose(End* end, cudaStream_t) {
  if (kernels_run) CloseEnd(*end);
  return cudaSuccess;
}

}  // namespace lamina::cuda::gda

// --- Ends -----------------------------------------------------------------------------------------------------------

namespace lamina::gda_test {
namespace {

constexpr std::uint32_t kSlots = 2;
constexpr std::uint64_t kSlotBytes = 64;

std::shared_ptr<GpuQueue> QueueOf(Endpoint& endpoint) {
  const auto address = [](const void* data) { return reinterpret_cast<std::uint64_t>(data); };
  const SendQueue& queue = endpoint.queue;
  return std::make_shared<GpuQueue>(
      0, DriverQueue{address(queue.wqes), address(queue.record), address(queue.doorbell), address(queue.cqes),
                     address(queue.cq_record), queue.log_num_wqes, queue.log_num_cqes, queue.qpn});
}

std::unique_ptr<GpuEnd> MakeEnd(Role role) {
  return std::make_unique<GpuEnd>(0, GpuEndOptions{role, "the peer", kSlots, kSlotBytes, PatientS()});
}

nic_model::MemoryKeys Register(Endpoint& endpoint, const GpuEnd& end) {
  return endpoint.nic.Register(reinterpret_cast<void*>(end.region()), end.region_bytes(), end.region(), true);
}

// A channel from a to b, and a program of each side that a graph would keep.
struct Pair {
  Pair() : writer(MakeEnd(Role::kWriter)), reader(MakeEnd(Role::kReader)) {
    const auto from = Register(world.a, *writer), to = Register(world.b, *reader);
    queues[0] = QueueOf(world.a);
    queues[1] = QueueOf(world.b);
    writer->Connect(queues[0], writer->region(), from.lkey, reader->region(), to.rkey);
    reader->Connect(queues[1], reader->region(), to.lkey, writer->region(), from.rkey);
    world.Start();
    send = MakeCall({writer->end()}, 1, stamp, out, {{sent, sizeof(sent)}});
    recv = MakeCall({reader->end()}, 1, stamp, out, {{got, sizeof(got)}});
  }

  // As GdaChannel.close does, but for the memory, which goes with the ends.
  void Close() {
    for (GpuEnd* end : {writer.get(), reader.get()}) end->Close();
    for (const auto& queue : queues) queue->Close();
  }

  std::uint64_t writes() const { return world.a.nic.writes() + world.b.nic.writes(); }

  // Both programs, once more, after their channel was closed.
  void Replay() {
    const std::uint64_t before = writes();
    std::memset(got, 0, sizeof(got));
    Send(send, Block{});
    Recv(recv, Block{});
    Check(got[0] == 0 && writes() == before, "a closed channel moves nothing");
  }

  World world;
  std::shared_ptr<GpuQueue> queues[2];
  std::unique_ptr<GpuEnd> writer, reader;
  char sent[64] = {}, got[64] = {};
  Stamp stamp{{3, 1, 0}}, out{};
  Call send, recv;
};

void Exchange(bool in_reach) {
  doorbell_in_reach = in_reach;
  Pair pair;
  Check(pair.queues[0]->uses_proxy() == !in_reach, "the CPU posts where the GPU cannot");
  for (int round = 0; round < 20; ++round) {
    Fill(pair.sent, sizeof(pair.sent), static_cast<std::uint64_t>(round));
    Send(pair.send, Block{});
    Recv(pair.recv, Block{});
    Check(std::memcmp(pair.sent, pair.got, sizeof(pair.got)) == 0, "round " + std::to_string(round));
  }
  CheckEqual(pair.writer->failure() + pair.reader->failure(), "");
  pair.Close();
  pair.Replay();
  CheckClean(pair.world);
}

// A graph that outlives the ends of its channel, and the next channel, which has their memory.
void Replayed(bool in_reach) {
  doorbell_in_reach = in_reach;
  Pair pair;
  Send(pair.send, Block{});
  const auto before = pair.send.ids[0];
  pair.Close();
  for (auto& queue : pair.queues) queue.reset();
  End* const places[] = {pair.writer->end(), pair.reader->end()};
  pair.writer.reset();
  pair.reader.reset();
  pair.Replay();
  Pair next;
  Check((next.writer->end() == places[0]) != (next.writer->end() == places[1]), "memory of ends is used again");
  Check(next.send.ids[0] != before, "numbers are not");
  pair.Replay();
  Check(next.writer->end()->next == 0 && next.reader->end()->next == 0, "nor is the next channel another's");
  Send(next.send, Block{});
  Recv(next.recv, Block{});
  CheckEqual(next.writer->failure() + next.reader->failure(), "");
  CheckClean(pair.world);
  CheckClean(next.world);
  next.Close();
}

// An end that has ended by an abort is closed like any other, and the peer goes on to hear of the abort.
void ClosedAfterAbort() {
  doorbell_in_reach = true;
  Pair pair;
  pair.writer->Abort();
  Until([&] { return pair.world.a.nic.writes() == 1; });
  pair.writer->Close();
  Check(pair.world.a.nic.writes() == 2, "the peer is told again");
  Recv(pair.recv, Block{});
  CheckHas(pair.reader->failure(), "the peer has aborted the channel");
  pair.Close();
  pair.Replay();
  const std::uint64_t before = pair.writes();
  pair.writer->Abort();
  Check(pair.writes() == before && pair.writer->failure().empty(), "an abort after the close is nothing");
  CheckClean(pair.world);
}

// The GPU runs nothing any more: still no kernel finds memory that is gone.
void NoKernelToClose() {
  doorbell_in_reach = true;
  kernels_run = false;
  Pair pair;
  pair.Close();
  pair.writer.reset();
  pair.reader.reset();
  kernels_run = true;
  pair.Replay();
}

}  // namespace
}  // namespace lamina::gda_test

int main(int argc, char** argv) {
  using namespace lamina::gda_test;
  return RunCases({{"exchange", [] { Exchange(true); }},
                   {"replayed", [] { Replayed(true); }},
                   {"closed_after_abort", ClosedAfterAbort},
                   {"no_kernel_to_close", NoKernelToClose},
                   {"proxy_exchange", [] { Exchange(false); }},
                   {"proxy_replayed", [] { Replayed(false); }}},
                  argc, argv);
}
