// The functions of libibverbs that are not in its header. The library is looked for when it is first used, so that this
// module loads where there is none.
#pragma once

#include <infiniband/verbs.h>

namespace lamina {

struct VerbsLibrary {
  const char* (*status_text)(ibv_wc_status status);
  int (*get_cq_event)(ibv_comp_channel* channel, ibv_cq** cq, void** context);
  void (*ack_cq_events)(ibv_cq* cq, unsigned int count);
  int (*get_async_event)(ibv_context* device, ibv_async_event* event);
  void (*ack_async_event)(ibv_async_event* event);
  const char* (*event_text)(ibv_event_type type);

  // Takes one event from the channel of `cq`, which must be readable.
  void TakeEvent(ibv_cq* cq) const {
    ibv_cq* from = nullptr;
    void* context = nullptr;
    if (get_cq_event(cq->channel, &from, &context) == 0) ack_cq_events(from, 1);
  }
};

// Throws std::system_error if there is no libibverbs.so.1.
const VerbsLibrary& TheVerbsLibrary();

}  // namespace lamina
