// A CUDA graph that sends, receives and computes, replayed against a thread of the CPU: no XLA, no Python. Checks every
// element of every message, and prints one line of JSON:
//
//   {"bytes": .., "rounds": .., "round_trip_us": .., "publish_to_consumer_us": ..}
//
// round_trip_us: from one replay to the next: launch of the graph, message to the CPU, answer, a kernel that takes it.
// publish_to_consumer_us: median; from the CPU's publishing store until it sees what the kernel behind the recv stored,
// both ways over the bus.
//
// usage: raw_gpu_channel <bytes per message> <rounds>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <stdexcept>
#include <vector>

#include "cuda/device_end.h"
#include "cuda/kernels.h"

namespace {

using lamina::Message;
using lamina::Role;
using lamina::ShmChannel;
using lamina::cuda::Call;
using lamina::cuda::DeviceEnd;
using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kLayout = 4711;
constexpr std::uint32_t kSlots = 4;
constexpr double kTimeoutS = 10.0;

void Require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

void Require(const lamina::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.text);
}

// The next step's stamp; and the graph's answer to what it received.
__global__ void Begin(std::int32_t* stamp) { ++stamp[0]; }

__global__ void Consume(const std::int32_t* received, std::int32_t* sent, std::uint64_t count, std::uint64_t* done) {
  for (std::uint64_t i = threadIdx.x; i < count; i += blockDim.x) sent[i] = received[i] + 1;
  __syncthreads();
  if (threadIdx.x == 0) *reinterpret_cast<volatile std::uint64_t*>(done) += 1;
}

Message MessageOf(int step, std::uint64_t bytes) {
  Message message;
  message.tag = 1;
  message.step = step;
  message.layout = kLayout;
  message.num_tensors = 1;
  message.payload_bytes = lamina::AlignToLine(bytes);
  return message;
}

Call CallOf(DeviceEnd& end, std::int32_t* stamp, void* data, std::uint64_t bytes) {
  Call call{};
  call.stamp = stamp;
  call.stamp_out = stamp;
  call.tag = 1;
  call.layout = kLayout;
  call.num_tensors = 1;
  call.tensors[0] = {static_cast<char*>(data), bytes};
  call.payload_bytes = lamina::AlignToLine(bytes);
  call.num_ends = 1;
  call.ends[0] = end.end();
  call.ids[0] = end.id();
  return call;
}

struct Link {
  std::shared_ptr<DeviceEnd> gpu;
  std::shared_ptr<ShmChannel> cpu;

  Link(Role gpus_role, std::uint64_t bytes) {
    const Role cpus_role = gpus_role == Role::kWriter ? Role::kReader : Role::kWriter;
    bytes = lamina::AlignToLine(bytes);
    gpu = DeviceEnd::Create({lamina::cuda::Kind::kHost, 0}, {gpus_role, "the CPU", kTimeoutS, 0.0}, kSlots, bytes);
    cpu = ShmChannel::Attach({cpus_role, "the GPU", kTimeoutS, 1e6}, gpu->path(), kSlots, bytes);
  }
};

class Bench {
 public:
  Bench(std::uint64_t bytes, int rounds)
      : bytes_(bytes), count_(bytes / sizeof(std::int32_t)), rounds_(rounds), up_(Role::kWriter, bytes),
        down_(Role::kReader, bytes) {
    Require(cudaMalloc(&sent_, bytes), "memory");
    Require(cudaMalloc(&received_, bytes), "memory");
    Require(cudaMalloc(&stamp_, 3 * sizeof(std::int32_t)), "memory");
    Require(cudaHostAlloc(&done_, sizeof(*done_), cudaHostAllocMapped), "pinned memory");
    *done_ = 0;
    std::vector<std::int32_t> first(count_);
    for (std::uint64_t i = 0; i < count_; ++i) first[i] = static_cast<std::int32_t>(i);
    Require(cudaMemcpy(sent_, first.data(), bytes, cudaMemcpyHostToDevice), "copy");
    const std::int32_t stamp[3] = {-1, 0, 0};
    Require(cudaMemcpy(stamp_, stamp, sizeof(stamp), cudaMemcpyHostToDevice), "copy");
    Require(cudaStreamCreate(&stream_), "stream");
    Capture();
  }

  // Replays without a pause; returns microseconds per round.
  double RoundTrip() {
    auto echo = std::async(std::launch::async, [this] { Echo(rounds_); });
    const auto start = Clock::now();
    for (int i = 0; i < rounds_; ++i) Require(cudaGraphLaunch(graph_, stream_), "launch");
    Require(cudaStreamSynchronize(stream_), "replay");
    const std::chrono::duration<double, std::micro> took = Clock::now() - start;
    echo.get();
    Check();
    return took.count() / rounds_;
  }

  // The graph's recv is long waiting when the CPU answers; median of microseconds.
  double PublishToConsumer() {
    std::vector<double> took;
    for (int i = 0; i < rounds_ / 4 + 1; ++i) {
      const std::uint64_t before = Done();
      Require(cudaGraphLaunch(graph_, stream_), "launch");
      Echo(1, [&] { start_ = Clock::now(); });
      const auto limit = Clock::now() + std::chrono::duration<double>(kTimeoutS);
      while (Done() == before) {
        if (Clock::now() > limit) throw std::runtime_error("the kernel behind the recv did not run");
      }
      took.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start_).count());
      Require(cudaStreamSynchronize(stream_), "replay");
    }
    Check();
    std::nth_element(took.begin(), took.begin() + took.size() / 2, took.end());
    return took[took.size() / 2];
  }

 private:
  std::uint64_t Done() const { return *reinterpret_cast<volatile std::uint64_t*>(done_); }

  void Capture() {
    cudaGraph_t captured;
    Require(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    Begin<<<1, 1, 0, stream_>>>(stamp_);
    Require(LaunchSend(CallOf(*up_.gpu, stamp_, sent_, bytes_), stream_), "send");
    Require(LaunchRecv(CallOf(*down_.gpu, stamp_, received_, bytes_), stream_), "recv");
    Consume<<<1, 512, 0, stream_>>>(received_, sent_, count_, done_);
    Require(cudaStreamEndCapture(stream_, &captured), "capture");
    Require(cudaGraphInstantiate(&graph_, captured, 0), "graph");
  }

  void Echo(int rounds) {
    Echo(rounds, [] {});
  }

  // Checks what the GPU sent, which grows by 2 with every round, and sends it back plus 1.
  template <typename BeforePublish>
  void Echo(int rounds, BeforePublish before_publish) {
    for (int i = 0; i < rounds; ++i, ++step_) {
      const Message message = MessageOf(step_, bytes_);
      const char* from = nullptr;
      char* to = nullptr;
      Require(up_.cpu->Peek(message, &from));
      Require(down_.cpu->Reserve(message, &to));
      for (std::uint64_t k = 0; k < count_; ++k) {
        const std::int32_t value = reinterpret_cast<const std::int32_t*>(from)[k];
        wrong_ += value != static_cast<std::int32_t>(k) + 2 * step_;
        reinterpret_cast<std::int32_t*>(to)[k] = value + 1;
      }
      up_.cpu->Release();
      before_publish();
      down_.cpu->Publish();
    }
  }

  void Check() {
    Require(up_.gpu->failure());
    Require(down_.gpu->failure());
    if (wrong_ != 0) throw std::runtime_error(std::to_string(wrong_) + " elements came with a wrong value");
  }

  const std::uint64_t bytes_, count_;
  const int rounds_;
  Link up_, down_;
  std::int32_t *sent_ = nullptr, *received_ = nullptr, *stamp_ = nullptr;
  std::uint64_t* done_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
  int step_ = 0;
  std::uint64_t wrong_ = 0;
  Clock::time_point start_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s <bytes per message> <rounds>\n", argv[0]);
    return 2;
  }
  try {
    const std::uint64_t bytes = std::strtoull(argv[1], nullptr, 10);
    const int rounds = std::atoi(argv[2]);
    Bench bench(bytes, rounds);
    const double round_trip = bench.RoundTrip(), latency = bench.PublishToConsumer();
    std::printf("{\"bytes\": %llu, \"rounds\": %d, \"round_trip_us\": %.3f, \"publish_to_consumer_us\": %.3f}\n",
                static_cast<unsigned long long>(bytes), rounds, round_trip, latency);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
