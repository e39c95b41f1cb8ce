#include "verbs_library.h"

#include <dlfcn.h>

#include <cerrno>
#include <string>
#include <system_error>

namespace lamina {
namespace {

template <typename Function>
void Find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function == nullptr) throw std::system_error(ENOSYS, std::generic_category(), std::string("no ") + name);
}

VerbsLibrary Load() {
  // Mostly the one that pyverbs has loaded already.
  void* const library = dlopen("libibverbs.so.1", RTLD_NOW);
  if (library == nullptr) throw std::system_error(ENOENT, std::generic_category(), dlerror());
  VerbsLibrary found{};
  Find(library, "ibv_wc_status_str", &found.status_text);
  Find(library, "ibv_get_cq_event", &found.get_cq_event);
  Find(library, "ibv_ack_cq_events", &found.ack_cq_events);
  Find(library, "ibv_get_async_event", &found.get_async_event);
  Find(library, "ibv_ack_async_event", &found.ack_async_event);
  Find(library, "ibv_event_type_str", &found.event_text);
  return found;
}

}  // namespace

const VerbsLibrary& TheVerbsLibrary() {
  static const VerbsLibrary library = Load();
  return library;
}

}  // namespace lamina
