// The kernels themselves, on a GPU: two ends on it, joined by software NICs that read and write pinned memory.
//
// Also replayed as a CUDA graph, to show that nothing of a message's position is in the launch.
#include <cuda_runtime.h>

#include <vector>

#include "gda_harness.h"
#include "gda_kernels.h"

namespace lamina::gda_test {
namespace {

void Require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::cout << "FAILED " << what << ": " << cudaGetErrorString(error) << std::endl;
  std::exit(1);
}

// Memory of the harness, for the GPU: pinned where it is, under the same address (unified addressing).
void Pin(void* data, std::size_t bytes) {
  constexpr std::uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<std::uintptr_t>(data) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes + kPage - 1) / kPage * kPage;
  // Page by page, as structures share pages.
  for (std::uintptr_t page = begin; page < end; page += kPage) {
    const cudaError_t error = cudaHostRegister(reinterpret_cast<void*>(page), kPage, cudaHostRegisterMapped);
    if (error != cudaErrorHostMemoryAlreadyRegistered) Require(error, "cudaHostRegister");
    cudaGetLastError();
  }
}

void PinEndpoint(Endpoint& endpoint) {
  Pin(&endpoint, sizeof(endpoint));
  for (const Memory* memory : {&endpoint.wqes, &endpoint.cqes, &endpoint.entries}) Pin(memory->data(), memory->size());
}

void PinHalf(Half& half) {
  Pin(&half, sizeof(half));
  Pin(half.region.data(), half.region.size());
}

// Each round sends and receives one message; the content is `words`, the stamp counts up.
struct Rounds {
  std::int32_t *stamp, *stamp_out, *sent, *got;
  std::uint32_t words;
};

Call CallOf(Half& half, const Rounds& rounds, std::int32_t* data) {
  Stamp unused{};
  Call call = MakeCall({&half.end}, 1, unused, unused, {{reinterpret_cast<char*>(data), rounds.words * 4}});
  call.stamp = rounds.stamp;
  call.stamp_out = rounds.stamp_out;
  return call;
}

__global__ void NextRound(Rounds rounds) {
  if (blockIdx.x * blockDim.x + threadIdx.x == 0) rounds.stamp[0] += 1;
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < rounds.words; i += gridDim.x * blockDim.x) {
    rounds.sent[i] += static_cast<std::int32_t>(i) + 1;
  }
}

// Every word that arrived must be what was sent.
__global__ void Compare(Rounds rounds, unsigned* different) {
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < rounds.words; i += gridDim.x * blockDim.x) {
    if (rounds.got[i] != rounds.sent[i]) atomicAdd(different, 1u);
  }
}

void OnGpu(std::uint32_t words, int replays, bool use_proxy) {
  // Not on the stack, whose pages are not to be pinned.
  const auto owner = std::make_unique<World>(Setup{.adversarial = true, .use_proxy = use_proxy});
  World& world = *owner;
  Channel& channel = world.AddChannel(3, words * 4);
  for (Endpoint* endpoint : {&world.a, &world.b}) PinEndpoint(*endpoint);
  for (Half* half : {&channel.writer, &channel.reader}) {
    half->SetTimeout(10);
    PinHalf(*half);
  }
  world.Start();
  Rounds rounds{nullptr, nullptr, nullptr, nullptr, words};
  unsigned* different = nullptr;
  Require(cudaMalloc(&rounds.stamp, 12), "cudaMalloc");
  Require(cudaMalloc(&rounds.stamp_out, 12), "cudaMalloc");
  Require(cudaMalloc(&rounds.sent, words * 4), "cudaMalloc");
  Require(cudaMalloc(&rounds.got, words * 4), "cudaMalloc");
  Require(cudaMalloc(&different, 4), "cudaMalloc");
  Require(cudaMemset(rounds.stamp, 0, 12), "cudaMemset");
  Require(cudaMemset(rounds.sent, 0, words * 4), "cudaMemset");
  Require(cudaMemset(different, 0, 4), "cudaMemset");
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t program;
  Require(cudaStreamCreate(&stream), "cudaStreamCreate");
  Require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  NextRound<<<4, 256, 0, stream>>>(rounds);
  Require(LaunchSend(CallOf(channel.writer, rounds, rounds.sent), stream), "send");
  Require(LaunchRecv(CallOf(channel.reader, rounds, rounds.got), stream), "recv");
  Compare<<<4, 256, 0, stream>>>(rounds, different);
  Require(cudaStreamEndCapture(stream, &graph), "capture");
  Require(cudaGraphInstantiate(&program, graph, 0), "cudaGraphInstantiate");
  for (int i = 0; i < replays; ++i) Require(cudaGraphLaunch(program, stream), "cudaGraphLaunch");
  Require(cudaStreamSynchronize(stream), "running");
  unsigned wrong = 0;
  Require(cudaMemcpy(&wrong, different, 4, cudaMemcpyDeviceToHost), "cudaMemcpy");
  Check(wrong == 0, std::to_string(wrong) + " words differ");
  CheckEqual(channel.writer.failure() + channel.reader.failure(), "");
  Check(channel.reader.end.next == static_cast<std::uint64_t>(replays), "every replay was a message");
  CheckClean(world);
  // The process ends after this: what was pinned stays so.
}

}  // namespace
}  // namespace lamina::gda_test

int main(int argc, char** argv) {
  using namespace lamina::gda_test;
  int gpus = 0, same_addresses = 0;
  if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) {
    std::cout << "no GPU" << std::endl;
    return 77;
  }
  Require(cudaDeviceGetAttribute(&same_addresses, cudaDevAttrCanUseHostPointerForRegisteredMem, 0), "attribute");
  if (same_addresses == 0) {
    std::cout << "the GPU has other addresses for pinned memory" << std::endl;
    return 77;
  }
  return RunCases({{"small", [] { OnGpu(64, 500, false); }},
                   {"large", [] { OnGpu(200'000, 50, false); }},
                   {"proxy", [] { OnGpu(1000, 200, true); }}},
                  argc, argv);
}
