// What Python sees of channels over RDMA.
#include "verbs_module.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <memory>
#include <string>

#include "handle.h"
#include "verbs_channel.h"
#include "verbs_library.h"

namespace nb = nanobind;

namespace lamina {
namespace {

using VerbsHandle = HandleOf<VerbsChannel>;

std::unique_ptr<VerbsHandle> Create(bool writer, std::string peer, std::uint32_t num_slots, std::uint64_t slot_bytes,
                                    double timeout_s, double spin_us, std::int32_t device) {
  TheVerbsLibrary();
  EndOptions options{writer ? Role::kWriter : Role::kReader, std::move(peer), timeout_s, spin_us};
  options.remote = true;
  return std::make_unique<VerbsHandle>(VerbsChannel::Create(std::move(options), num_slots, slot_bytes), device);
}

void Open(const VerbsHandle& handle, std::uintptr_t qp, std::uintptr_t cq, std::uint32_t lkey, std::uint32_t max_inline,
          std::uint32_t send_depth, std::uint32_t recv_depth, std::string where,
          std::string state_file) {
  handle.end()->Open({reinterpret_cast<ibv_qp*>(qp), reinterpret_cast<ibv_cq*>(cq), lkey, max_inline, send_depth,
                      recv_depth, std::move(where), std::move(state_file)});
}

void Connect(const VerbsHandle& handle, std::uint64_t region, std::uint32_t rkey, std::uint32_t pid,
             std::string host) {
  handle.end()->Connect({region, rkey, pid, std::move(host)});
}

}  // namespace

void BindVerbs(nb::module_& module) {
  const nb::call_guard<nb::gil_scoped_release> no_gil;
  nb::class_<VerbsHandle, Handle>(module, "VerbsHandle")
      .def_static("create", &Create, nb::arg("writer"), nb::arg("peer"), nb::arg("num_slots"), nb::arg("slot_bytes"),
                  nb::arg("timeout_s"), nb::arg("spin_us"), nb::arg("device") = kAnyDevice, no_gil)
      .def("open", &Open, nb::arg("qp"), nb::arg("cq"), nb::arg("lkey"), nb::arg("max_inline"), nb::arg("send_depth"),
           nb::arg("recv_depth"), nb::arg("where"), nb::arg("state_file"), no_gil)
      .def("connect", &Connect, nb::arg("region"), nb::arg("rkey"), nb::arg("pid"), nb::arg("host"), no_gil)
      .def_prop_ro("region", [](const VerbsHandle& handle) {
        return reinterpret_cast<std::uintptr_t>(handle.end()->region());
      })
      .def_prop_ro("region_bytes", [](const VerbsHandle& handle) { return handle.end()->region_bytes(); });
}

}  // namespace lamina
