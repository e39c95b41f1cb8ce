#include "verbs_events.h"

#include <poll.h>

#include <utility>

#include "verbs_library.h"

namespace lamina {

void VerbsEvents::Listen(ibv_qp* qp, ibv_cq* cq, Listener listener) {
  const std::lock_guard<std::mutex> lock(mutex_);
  entries_[qp] = {cq, std::move(listener)};
}

void VerbsEvents::Forget(ibv_qp* qp) {
  const std::lock_guard<std::mutex> lock(mutex_);
  entries_.erase(qp);
}

void VerbsEvents::Take(ibv_context* device) {
  const std::lock_guard<std::mutex> lock(mutex_);
  pollfd source{device->async_fd, POLLIN, 0};
  while (poll(&source, 1, 0) > 0) {
    ibv_async_event event;
    if (TheVerbsLibrary().get_async_event(device, &event) != 0) return;
    Tell(event);
    // Before this the queue pair could not be destroyed.
    TheVerbsLibrary().ack_async_event(&event);
  }
}

void VerbsEvents::Tell(const ibv_async_event& event) {
  const std::string why = std::string("the device reports: ") + TheVerbsLibrary().event_text(event.event_type);
  for (const auto& [qp, entry] : entries_) {
    switch (event.event_type) {
      case IBV_EVENT_CQ_ERR:
        if (entry.cq == event.element.cq) entry.listener(why);
        break;
      case IBV_EVENT_QP_FATAL:
      case IBV_EVENT_QP_REQ_ERR:
      case IBV_EVENT_QP_ACCESS_ERR:
        if (qp == event.element.qp) entry.listener(why);
        break;
      case IBV_EVENT_DEVICE_FATAL:
        entry.listener(why);
        break;
      default:
        // A port that goes down may come back before the retries are used up.
        break;
    }
  }
}

VerbsEvents& TheVerbsEvents() {
  static auto* events = new VerbsEvents();
  return *events;
}

}  // namespace lamina
