// What a device reports that no completion tells: a completion queue that overran, a queue pair or a device that failed.
#pragma once

#include <infiniband/verbs.h>

#include <functional>
#include <map>
#include <mutex>
#include <string>

namespace lamina {

class VerbsEvents {
 public:
  using Listener = std::function<void(const std::string& why)>;

  // From now on `listener` hears what happens to these. It must not call this object.
  void Listen(ibv_qp* qp, ibv_cq* cq, Listener listener);
  // After this the listener is not called any more.
  void Forget(ibv_qp* qp);
  // Takes what the device has reported, if anything, and tells whom it concerns. Never waits.
  void Take(ibv_context* device);

 private:
  struct Entry {
    ibv_cq* cq;
    Listener listener;
  };

  void Tell(const ibv_async_event& event);

  std::mutex mutex_;
  std::map<ibv_qp*, Entry> entries_;
};

VerbsEvents& TheVerbsEvents();

}  // namespace lamina
