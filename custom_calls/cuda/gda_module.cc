// The Python module lamina_jax._gda_calls: queues and ends of gda channels, custom call handlers as capsules.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <memory>

#include "gda_end.h"
#include "gda_ffi_handlers.h"
#include "wording.h"

namespace nb = nanobind;

namespace lamina::cuda::gda {
namespace {

std::shared_ptr<GpuQueue> MakeQueue(int device, std::uint64_t wqes, std::uint32_t log_num_wqes, std::uint64_t record,
                                    std::uint64_t doorbell, std::uint64_t cqes, std::uint32_t log_num_cqes,
                                    std::uint64_t cq_record, std::uint32_t qpn) {
  return std::make_shared<GpuQueue>(
      device, DriverQueue{wqes, record, doorbell, cqes, cq_record, log_num_wqes, log_num_cqes, qpn});
}

std::shared_ptr<GpuEnd> MakeEnd(int device, bool writer, std::string peer, std::uint32_t num_slots,
                                std::uint64_t slot_bytes, double timeout_s) {
  const Role role = writer ? Role::kWriter : Role::kReader;
  auto end = std::make_shared<GpuEnd>(device, GpuEndOptions{role, std::move(peer), num_slots, slot_bytes, timeout_s});
  RegisterEnd(end);
  return end;
}

void CloseEnd(GpuEnd& end) {
  end.Close();
  UnregisterEnd(end.id());
}

template <typename Handler>
nb::capsule Capsule(Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace

NB_MODULE(_gda_calls, module) {
  nb::set_leak_warnings(false);
  const nb::call_guard<nb::gil_scoped_release> no_gil;

  nb::class_<GpuQueue>(module, "GpuQueue")
      .def_static("make", &MakeQueue, nb::arg("device"), nb::arg("wqes"), nb::arg("log_num_wqes"), nb::arg("record"),
                  nb::arg("doorbell"), nb::arg("cqes"), nb::arg("log_num_cqes"), nb::arg("cq_record"), nb::arg("qpn"),
                  no_gil)
      .def("close", &GpuQueue::Close, no_gil)
      .def_prop_ro("uses_proxy", &GpuQueue::uses_proxy);

  nb::class_<GpuEnd>(module, "GpuEnd")
      .def_static("make", &MakeEnd, nb::arg("device"), nb::arg("writer"), nb::arg("peer"), nb::arg("num_slots"),
                  nb::arg("slot_bytes"), nb::arg("timeout_s"), no_gil)
      .def("connect", &GpuEnd::Connect, nb::arg("queue"), nb::arg("nic_address"), nb::arg("lkey"),
           nb::arg("peer_region"), nb::arg("peer_rkey"), no_gil)
      .def("export_dmabuf", &GpuEnd::ExportDmabuf, no_gil)
      .def("abort", &GpuEnd::Abort, no_gil)
      .def("close", &CloseEnd, no_gil)
      .def_prop_ro("id", &GpuEnd::id)
      .def_prop_ro("region", &GpuEnd::region)
      .def_prop_ro("region_bytes", &GpuEnd::region_bytes)
      .def_prop_ro("failure", &GpuEnd::failure);

  module.def("pci_bus_id", &PciBusId, nb::arg("device"), no_gil);
  module.def("name_tag", &NameTag, nb::arg("tag"), nb::arg("name"));
  module.def("send_handler", [] { return Capsule(LaminaGdaSend); });
  module.def("recv_handler", [] { return Capsule(LaminaGdaRecv); });
}

}  // namespace lamina::cuda::gda
