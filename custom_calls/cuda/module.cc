// The Python module lamina_jax._cuda_calls: ends of channels that a GPU operates, custom call handlers as capsules. It
// loads without a GPU and without CUDA's driver, so that programs can be compiled ahead of time.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <optional>
#include <string>
#include <system_error>

#include "cuda/device_end.h"
#include "cuda/ffi_handlers.h"

namespace nb = nanobind;

namespace lamina::cuda {
namespace {

// What Python holds of an end: gone when it is collected, unless it was closed before.
class Handle {
 public:
  explicit Handle(std::shared_ptr<DeviceEnd> end) : end_(std::move(end)) {}
  ~Handle() { end_->Close(); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  DeviceEnd& end() const { return *end_; }
  void Close() {
    closed_ = true;
    end_->Close();
  }
  bool closed() const { return closed_; }

 private:
  const std::shared_ptr<DeviceEnd> end_;
  std::atomic<bool> closed_{false};
};

EndPlace Place(const std::string& kind, int device) {
  return {kind == "cuda_ipc" ? Kind::kIpc : Kind::kHost, device};
}

EndOptions Options(bool writer, std::string peer, double timeout_s) {
  return {writer ? Role::kWriter : Role::kReader, std::move(peer), timeout_s, 0.0, true};
}

std::unique_ptr<Handle> Create(const std::string& kind, int device, bool writer, std::string peer,
                               std::uint32_t num_slots, std::uint64_t slot_bytes, double timeout_s) {
  return std::make_unique<Handle>(
      DeviceEnd::Create(Place(kind, device), Options(writer, std::move(peer), timeout_s), num_slots, slot_bytes));
}

std::unique_ptr<Handle> Attach(const std::string& kind, int device, bool writer, std::string peer,
                               const std::string& path, std::uint32_t num_slots, std::uint64_t slot_bytes,
                               double timeout_s) {
  return std::make_unique<Handle>(
      DeviceEnd::Attach(Place(kind, device), Options(writer, std::move(peer), timeout_s), path, num_slots, slot_bytes));
}

std::optional<std::string> Failure(const Handle& handle) {
  Status status = handle.end().failure();
  return status.ok() ? std::nullopt : std::make_optional(std::move(status.text));
}

void TranslateSystemError(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const std::system_error& error) {
    const nb::object arguments = nb::make_tuple(error.code().value(), error.what());
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
}

template <typename Handler>
nb::capsule Capsule(Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace

NB_MODULE(_cuda_calls, module) {
  nb::set_leak_warnings(false);
  nb::register_exception_translator(TranslateSystemError);
  const nb::call_guard<nb::gil_scoped_release> no_gil;

  nb::class_<Handle>(module, "DeviceHandle")
      .def_static("create", &Create, nb::arg("kind"), nb::arg("device"), nb::arg("writer"), nb::arg("peer"),
                  nb::arg("num_slots"), nb::arg("slot_bytes"), nb::arg("timeout_s"), no_gil)
      .def_static("attach", &Attach, nb::arg("kind"), nb::arg("device"), nb::arg("writer"), nb::arg("peer"),
                  nb::arg("path"), nb::arg("num_slots"), nb::arg("slot_bytes"), nb::arg("timeout_s"), no_gil)
      .def("abort", [](Handle& handle) { handle.end().Abort(); }, no_gil)
      .def("close", &Handle::Close, no_gil)
      .def_prop_ro("id", [](const Handle& handle) { return handle.end().id(); })
      .def_prop_ro("path", [](const Handle& handle) { return handle.end().path(); })
      .def_prop_ro("peer_pid", [](const Handle& handle) { return handle.end().peer_pid(); })
      .def_prop_ro("closed", &Handle::closed)
      .def_prop_ro("failure", &Failure);

  // (how many GPUs there are, why there are none)
  module.def("devices", [] {
    const Devices devices = FindDevices();
    return nb::make_tuple(devices.count, devices.why_none);
  });
  module.def("launch_count", &LaunchCount);
  module.def("name_tag", &NameTag, nb::arg("tag"), nb::arg("name"));
  module.def("send_handler", [] { return Capsule(LaminaCudaSend); });
  module.def("recv_handler", [] { return Capsule(LaminaCudaRecv); });
  module.def("fence_handler", [] { return Capsule(LaminaCudaFence); });
}

}  // namespace lamina::cuda
