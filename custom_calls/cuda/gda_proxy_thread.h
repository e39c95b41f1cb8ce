// The host's half of gda_proxy.h: a thread that posts what device code left in the proxy queue.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "gda_proxy.h"

namespace lamina::cuda::gda {

// Runs from construction to destruction. Both queues must outlive it; `queue` and its state are the thread's alone.
class ProxyThread {
 public:
  ProxyThread(ProxyQueue proxy, SendQueue queue);
  ~ProxyThread();
  // Waits until the NIC is done with what device code had left before, or the queue is broken. False if not in time.
  bool Settle(std::uint64_t deadline_ns);
  ProxyThread(const ProxyThread&) = delete;
  ProxyThread& operator=(const ProxyThread&) = delete;

 private:
  void Run();
  bool TakeOne();  // false if there is no request
  void PostTaken();
  void Report(std::uint32_t error);
  void ReportCompleted();

  const ProxyQueue proxy_;
  const SendQueue queue_;
  std::uint64_t taken_ = 0;
  std::vector<Write> writes_;  // taken, but their Post is not complete yet
  std::atomic<bool> stop_{false};
  std::atomic<std::uint32_t> asked_{0}, settled_{0};
  std::thread thread_;
};

}  // namespace lamina::cuda::gda
