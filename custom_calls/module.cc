// The Python module lamina_jax._custom_calls: channels as objects, custom call handlers as capsules.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <memory>
#include <string>
#include <system_error>

#include "ffi_handlers.h"
#include "handle.h"
#include "ping_pong.h"
#include "registry.h"
#include "shm_channel.h"
#include "tcp_module.h"
#include "timeline.h"
#ifdef LAMINA_VERBS
#include "verbs_module.h"
#endif

namespace nb = nanobind;

namespace lamina {
namespace {

using ShmHandle = HandleOf<ShmChannel>;

EndOptions Options(bool writer, std::string peer, double timeout_s, double spin_us, bool polled = false) {
  return {writer ? Role::kWriter : Role::kReader, std::move(peer), timeout_s, spin_us, polled};
}

std::unique_ptr<ShmHandle> Create(bool writer, std::string peer, std::uint32_t num_slots, std::uint64_t slot_bytes,
                               double timeout_s, double spin_us, bool polled, std::int32_t device) {
  return std::make_unique<ShmHandle>(
      ShmChannel::Create(Options(writer, std::move(peer), timeout_s, spin_us, polled), num_slots, slot_bytes), device);
}

std::unique_ptr<ShmHandle> Attach(bool writer, std::string peer, const std::string& path, std::uint32_t num_slots,
                               std::uint64_t slot_bytes, double timeout_s, double spin_us) {
  return std::make_unique<ShmHandle>(
      ShmChannel::Attach(Options(writer, std::move(peer), timeout_s, spin_us), path, num_slots, slot_bytes));
}

std::string Path(const ShmHandle& handle) { return handle.end()->path(); }

void TranslateSystemError(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const std::system_error& error) {
    const nb::object arguments = nb::make_tuple(error.code().value(), error.what());
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
}

// (the events as bytes, how many were dropped)
nb::tuple Drain() {
  DrainedTimeline drained;
  {
    const nb::gil_scoped_release no_gil;
    drained = DrainTimeline();
  }
  const std::size_t bytes = drained.events.size() * sizeof(TimelineEvent);
  return nb::make_tuple(nb::bytes(reinterpret_cast<const char*>(drained.events.data()), bytes), drained.dropped);
}

template <typename Handler>
nb::capsule Capsule(Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace

NB_MODULE(_custom_calls, module) {
  // What a process still holds when it exits is no news to its user.
  nb::set_leak_warnings(false);
  nb::register_exception_translator(TranslateSystemError);
  const nb::call_guard<nb::gil_scoped_release> no_gil;

  nb::class_<Handle>(module, "ChannelHandle")
      .def("abort", &Handle::Abort, no_gil)
      .def("close", &Handle::Close, no_gil)
      .def_prop_ro("id", &Handle::id)
      .def_prop_ro("peer_pid", &Handle::peer_pid)
      .def_prop_ro("closed", &Handle::closed)
      .def_prop_ro("failure", &Handle::failure);

  nb::class_<ShmHandle, Handle>(module, "ShmHandle")
      .def_static("create", &Create, nb::arg("writer"), nb::arg("peer"), nb::arg("num_slots"), nb::arg("slot_bytes"),
                  nb::arg("timeout_s"), nb::arg("spin_us"), nb::arg("polled") = false, nb::arg("device") = kAnyDevice,
                  no_gil)
      .def_static("attach", &Attach, nb::arg("writer"), nb::arg("peer"), nb::arg("path"), nb::arg("num_slots"),
                  nb::arg("slot_bytes"), nb::arg("timeout_s"), nb::arg("spin_us"), no_gil)
      .def_prop_ro("path", &Path);

  BindTcp(module);
#ifdef LAMINA_VERBS
  BindVerbs(module);
#endif

  module.def("ping_pong", [](std::int64_t outbox, std::int64_t inbox, std::uint64_t num_bytes, std::uint32_t count,
                             bool first, bool copies) { return Play({outbox, inbox, num_bytes, count, first, copies}); },
             nb::arg("outbox"), nb::arg("inbox"), nb::arg("num_bytes"), nb::arg("count"), nb::arg("first"),
             nb::arg("copies"), no_gil);
  module.def("stream", &Stream, nb::arg("channel"), nb::arg("num_bytes"), nb::arg("count"), nb::arg("copies"), no_gil);

  module.attr("ANY_DEVICE") = kAnyDevice;
  module.def("name_tag", &NameTag, nb::arg("tag"), nb::arg("name"));
  module.def("start_timeline", &StartTimeline, nb::arg("capacity"), no_gil);
  module.def("drain_timeline", &Drain);
  module.def("align", &AlignToLine, nb::arg("num_bytes"));
  module.def("send_handler", [] { return Capsule(LaminaSend); });
  module.def("recv_handler", [] { return Capsule(LaminaRecv); });
  module.def("fence_handler", [] { return Capsule(LaminaFence); });
  module.def("compile_only_handler", [] { return Capsule(LaminaCompileOnly); });
}

}  // namespace lamina
