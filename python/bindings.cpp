// bindings.cpp - the Python module nsa_sel._core: names, keyword arguments, GIL. What it binds lives in cpp/ and cuda/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>  // std::optional

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "call_cache.h"
#include "dispatch.h"
#include "instances.h"
#include "launch.h"

#if NSA_SEL_HAS_KERNELS
#include "driver/driver.h"
#include "driver/images.h"
#endif

namespace py = pybind11;
using nsa_sel::DecodeLaunch;
using nsa_sel::DecodeRequest;
using nsa_sel::DeviceLimits;

namespace {

std::string dtype_name(nsa_sel::Dtype dtype) { return dtype == nsa_sel::Dtype::kFloat16 ? "float16" : "bfloat16"; }

py::list instance_list() {
  py::list instances;
  for (const nsa_sel::InstanceKey& key : nsa_sel::kInstances) {
    py::dict entry;
    const bool bulk = key.loads == nsa_sel::Loads::kBulk;
    entry["name"] = nsa_sel::instance_name(key);
    entry["loads"] = bulk ? "bulk" : "cp.async";
    entry["cache"] = key.cache == nsa_sel::Cache::kSame ? "same" : "float8_e4m3fn";
    entry["dtype"] = dtype_name(key.dtype);
    entry["Dk"] = key.Dk;
    entry["Dv"] = key.Dv;
    entry["head_tile"] = key.head_tile;
    instances.append(entry);
  }
  return instances;
}

py::dict build_info() {
  py::dict info;
#if NSA_SEL_HAS_KERNELS
  info["kernels"] = true;
  info["reason"] = py::none();
  info["cuda_version"] = NSA_SEL_CUDA_VERSION;
  info["compiler"] = "NVRTC " NSA_SEL_CUDA_VERSION;
  info["oldest_driver"] = NSA_SEL_OLDEST_CUDA >= 13000 ? "580 (CUDA 13.0)" : "525 (CUDA 12.0)";
  info["architectures"] = py::str(NSA_SEL_ARCHITECTURES).attr("split")(";");
  info["instances"] = instance_list();
#else
  info["kernels"] = false;
  info["reason"] = NSA_SEL_NO_KERNELS_REASON;
  info["cuda_version"] = py::none();
  info["compiler"] = py::none();
  info["oldest_driver"] = py::none();
  info["architectures"] = py::list();
  info["instances"] = py::list();
#endif
  info["version"] = NSA_SEL_VERSION;
  return info;
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

py::dict plan_dict(const nsa_sel::DecodePlan& plan) {
  py::dict d;
  d["grid"] = plan.grid;
  d["blocks_per_sm"] = plan.blocks_per_sm;
  d["num_slots"] = plan.smem.num_slots;
  d["smem_bytes"] = plan.smem.total;
  d["full_rows"] = plan.full_rows;
  d["split_rows"] = plan.split_rows;
  d["num_splits"] = plan.num_splits;
  d["cluster"] = plan.cluster;
  d["workspace_bytes"] = plan.workspace_floats * 4;
  return d;
}

py::list request_fields() {
  py::list fields;
  for (const nsa_sel::RequestField& field : nsa_sel::kRequestFields) {
    fields.append(py::make_tuple(field.name, field.count));
  }
  return fields;
}

nsa_sel::Loads loads_by_name(const std::string& name) {
  if (name == "cp.async") return nsa_sel::Loads::kCpAsync;
  if (name == "bulk") return nsa_sel::Loads::kBulk;
  throw std::invalid_argument("loads: expected 'cp.async' or 'bulk', got '" + name + "'");
}

nsa_sel::Cache cache_by_name(const std::string& name) {
  if (name == "same") return nsa_sel::Cache::kSame;
  if (name == "float8_e4m3fn") return nsa_sel::Cache::kFloat8E4m3;
  throw std::invalid_argument("cache: expected 'same' or 'float8_e4m3fn', got '" + name + "'");
}

py::dict tile_shape(int Dk, int Dv, int head_tile, const std::string& loads, const std::string& cache) {
  const nsa_sel::TileShape tile = nsa_sel::tile_shape(Dk, Dv, head_tile, loads_by_name(loads), cache_by_name(cache));
  py::dict d;
  d["Dk"] = tile.Dk;
  d["Dv"] = tile.Dv;
  d["head_tile"] = tile.head_tile;
  d["head_warps"] = tile.head_warps;
  d["token_warps"] = tile.token_warps;
  d["units"] = tile.units;
  d["cache_bytes"] = tile.cache_bytes;
  d["slot_bytes"] = tile.slot_bytes;
  d["rows_k"] = tile.rows_k;
  d["rows_v"] = tile.rows_v;
  d["segment"] = tile.segment;
  d["blocks_per_sm"] = tile.blocks_per_sm;
  d["threads"] = nsa_sel::kDecodeThreads;
  return d;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled part of nsa_sel: launch planning and, where built with them, the CUDA kernels.";
  m.def("build_info", &build_info, "What this build holds: kernels, architectures, instances, CUDA version.");
  m.def("instances", &instance_list, "The table of instances in cpp/instances.h, whether it is compiled or not.");
  m.def("request_fields", &request_fields, "(name, number of 64-bit values) of each member of a DecodeRequest.");
  m.def("tile_shape", &tile_shape, "Compile-time numbers of an instance.", py::arg("Dk"), py::arg("Dv"),
        py::arg("head_tile"), py::arg("loads") = "cp.async", py::arg("cache") = "same");
  m.def("bytes_in_flight_needed", &nsa_sel::bytes_in_flight_needed, "Bytes that one SM must have in flight.",
        py::arg("capability"));

  nsa_sel::bind_call_cache(m);

  py::class_<DeviceLimits>(m, "DeviceLimits", "What planning needs to know of a GPU.")
      .def(py::init([](int sm_count, int capability, int smem_per_block, int smem_per_sm) {
             return DeviceLimits{sm_count, capability, smem_per_block, smem_per_sm};
           }),
           py::kw_only(), py::arg("sm_count"), py::arg("capability"), py::arg("smem_per_block"), py::arg("smem_per_sm"))
      .def_readonly("sm_count", &DeviceLimits::sm_count)
      .def_readonly("capability", &DeviceLimits::capability)
      .def_readonly("smem_per_block", &DeviceLimits::smem_per_block)
      .def_readonly("smem_per_sm", &DeviceLimits::smem_per_sm);

  py::class_<DecodeLaunch>(m, "DecodeLaunch", "One planned launch; run() puts it on a stream.")
      .def(py::init([](const py::bytes& request, const DeviceLimits& device) {
             const std::string_view bytes = request;
             if (bytes.size() != sizeof(DecodeRequest)) {
               throw std::invalid_argument("request: expected " + std::to_string(sizeof(DecodeRequest)) +
                                           " bytes, got " + std::to_string(bytes.size()));
             }
             DecodeRequest r;
             std::memcpy(&r, bytes.data(), sizeof r);
             return nsa_sel::prepare_decode(r, device);
           }),
           "Plans a call from the bytes of its DecodeRequest. Raises ValueError where no instance or layout fits.",
           py::arg("request"), py::arg("device"))
      .def_property_readonly("workspace_floats",
                             [](const DecodeLaunch& launch) { return launch.plan.workspace_floats; })
      .def_property_readonly("plan", [](const DecodeLaunch& launch) { return plan_dict(launch.plan); })
      .def(
          "run",
          [](DecodeLaunch& launch, std::uintptr_t workspace, int device, std::uintptr_t stream) {
            launch.set_workspace(pointer<float>(workspace));
            py::gil_scoped_release release;
            return nsa_sel::launch(launch, device, pointer<void>(stream));
          },
          "Launches on `stream` (a CUstream as int) of a device with workspace_floats floats of workspace. Returns 0 "
          "or a code of the driver; raises RuntimeError where the kernel cannot be loaded.",
          py::arg("workspace"), py::arg("device"), py::arg("stream"));

#if NSA_SEL_HAS_KERNELS
  for (int kernel = 0; kernel < nsa_sel::kNumKernels; ++kernel) {  // a forgotten one must not wait for its first call
    if (nsa_sel::find_container(nsa_sel::kernel_name(kernel)) == nullptr) {
      throw py::import_error("expected the kernel " + nsa_sel::kernel_name(kernel) + " in this build, got none");
    }
  }
  using Unlocked = py::call_guard<py::gil_scoped_release>;  // loading may take seconds
  m.def("driver_bar", &nsa_sel::driver_bar, Unlocked(), "Why no kernel can run on any GPU here, or None.");
  m.def("driver_version", &nsa_sel::driver_version, Unlocked(), "Newest CUDA that the driver knows, as 12040.");
  m.def("kernel_bar", &nsa_sel::kernel_bar, Unlocked(),
        "Loads an instance for a device. Why it cannot run there, remembered, or None; raises what is no such reason.",
        py::arg("device"), py::arg("instance"));
  m.def("forget_kernel_bars", &nsa_sel::forget_kernel_bars, "Lets kernel_bar try again.");
  m.def(
      "max_active_clusters",
      [](int device, int kernel, unsigned grid, unsigned block, unsigned smem_bytes, unsigned cluster) {
        return nsa_sel::max_active_clusters(device, kernel, {grid, block, smem_bytes, cluster, false});
      },
      Unlocked(), "How many clusters of a kernel the device holds at once.", py::arg("device"), py::arg("kernel"),
      py::kw_only(), py::arg("grid"), py::arg("block"), py::arg("smem_bytes"), py::arg("cluster"));
  m.def("device_limits", &nsa_sel::device_limits, Unlocked(), "Limits of a GPU by its index.", py::arg("device"));
  m.def("error_string", &nsa_sel::error_string, "Name and text of a code of run().", py::arg("code"));
  m.def("is_refusal", &nsa_sel::is_refusal, "Whether the device will never take this launch and can go on with others.",
        py::arg("code"));
#endif
}
