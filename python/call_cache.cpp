// call_cache.cpp - a call whose arguments look like those of an earlier one goes straight to that call's launch.
//
// Checking, routing and planning look at types, shapes, strides, dtypes, devices, alignment and scalars, never at
// values. So a call with the same signature has the same outcome: its tensors are read through torch's DLPack exchange
// interface, its signature is looked up, the results are allocated, the launch gets the new addresses. What is not
// plain, a subclass, a gradient, a mode, an `out` near an input, goes to Python, as does every error. All of it runs
// under the GIL, but for the launch.
#include "call_cache.h"

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "launch.h"

namespace py = pybind11;

namespace nsa_sel {
namespace {

// The part of DLPack 1.3 that is used here: C structures that never change within major version 1.
struct DlTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlExchange {
  uint32_t major, minor;
  void* previous;
  void* unused[3];  // managed tensors: an allocator, from and to Python
  int (*tensor_of)(void* object, DlTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};
constexpr int32_t kDlCuda = 2;

constexpr size_t kMostEntries = 1024;
constexpr int kPositional = 5;  // backend, q, k, v, ranges
const char* const kKeywords[] = {"block_indices", "block_size", "counts",          "seq_lens",
                                 "block_table",   "table_rows", "causal",          "max_selected",
                                 "softmax_scale", "return_lse", "batch_invariant", "out"};
constexpr int kNumKeywords = sizeof(kKeywords) / sizeof(kKeywords[0]);
constexpr int kOut = kPositional + 11;
// The tensors among the arguments, in the order of DecodeParams; ranges and block_indices share a place there.
constexpr int kTensors[] = {
    1, 2, 3, 4, kPositional, kPositional + 2, kPositional + 3, kPositional + 4, kPositional + 5, kOut};
constexpr int kNumTensors = sizeof(kTensors) / sizeof(kTensors[0]);
constexpr int kScalars[] = {kPositional + 1, kPositional + 6, kPositional + 7,
                            kPositional + 8, kPositional + 9, kPositional + 10};

struct Entry {
  DecodeLaunch launch;
  py::object out_shape, lse_shape, workspace_shape, dtype, float32, device;
  bool return_lse = false;
  int device_index = 0;
  uint64_t* count = nullptr;
};

using Key = std::vector<int64_t>;
struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t h = 1469598103934665603ull;
    for (int64_t word : key) h = (h ^ uint64_t(word)) * 1099511628211ull, h ^= h >> 29;
    return size_t(h);
  }
};

// Never destroyed: its objects may outlive the interpreter.
struct State {
  PyObject *slow = nullptr, *tensor = nullptr, *parameter = nullptr, *empty = nullptr, *grad_enabled = nullptr;
  PyObject *function_modes = nullptr, *forward_ad = nullptr, *current_level = nullptr, *requires_grad = nullptr;
  PyObject *empty_keywords = nullptr, *known_keywords = nullptr;
  const DlExchange* exchange = nullptr;
  uint64_t epoch = 0;
  std::unordered_map<Key, std::shared_ptr<Entry>, KeyHash> entries;
  std::map<std::pair<std::string, std::string>, uint64_t> counts;
  int (*launcher)(const DecodeLaunch*, int, void*) = nullptr;  // instead of the driver, for tests and benchmarks
};
State& state() {
  static State* made = new State;
  return *made;
}
thread_local std::shared_ptr<Entry> offered;
thread_local std::shared_ptr<Entry> confirmed;

bool plain_zero(PyObject* function) {
  PyObject* result = PyObject_CallNoArgs(function);
  if (result == nullptr) return PyErr_Clear(), false;
  const bool zero = PyObject_Not(result) == 1;
  Py_DECREF(result);
  return zero;
}

bool wants_gradients(const State& s, PyObject* tensor) {
  PyObject* flag = PyObject_GetAttr(tensor, s.requires_grad);
  if (flag == nullptr) return PyErr_Clear(), true;
  Py_DECREF(flag);
  return flag != Py_False;
}

bool known_keywords(State& s, PyObject* names) {
  if (names == s.known_keywords) return true;
  if (names == nullptr || PyTuple_GET_SIZE(names) != kNumKeywords) return false;
  for (int i = 0; i < kNumKeywords; ++i) {
    if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, i), kKeywords[i]) != 0) return false;
  }
  Py_INCREF(names);  // a call site has one tuple for good: kept, so that its address stays its own
  Py_XDECREF(s.known_keywords);
  s.known_keywords = names;
  return true;
}

// Reads the arguments into `key` and the tensors into `read`; false: not a call that may be served.
bool describe(State& s, PyObject* const* args, DlTensor* read, Key& key) {
  if (!plain_zero(s.function_modes)) return false;
  const bool gradients = !plain_zero(s.grad_enabled);
  PyObject* level = PyObject_GetAttr(s.forward_ad, s.current_level);
  if (level == nullptr) return PyErr_Clear(), false;
  const long depth = PyLong_AsLong(level);
  Py_DECREF(level);
  if (depth >= 0) return false;

  Py_ssize_t bytes = 0;
  const char* backend = PyUnicode_CheckExact(args[0]) ? PyUnicode_AsUTF8AndSize(args[0], &bytes) : nullptr;
  if (backend == nullptr || bytes > 8) return PyErr_Clear(), false;
  int64_t word = 0;
  std::memcpy(&word, backend, size_t(bytes));
  key.push_back(word);

  for (int i = 0; i < kNumTensors; ++i) {
    PyObject* argument = args[kTensors[i]];
    DlTensor& t = read[i];
    t.data = nullptr;
    if (argument == Py_None) {
      key.push_back(0);
      continue;
    }
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(argument));
    if (type != s.tensor && type != s.parameter) return false;
    if (s.exchange->tensor_of(argument, &t) != 0) return PyErr_Clear(), false;
    if (t.ndim > 5 || (t.ndim > 0 && (t.shape == nullptr || t.strides == nullptr)) || t.lanes != 1) return false;
    t.data = static_cast<char*>(t.data) + t.byte_offset;
    const bool matters = i < 3 || i == kNumTensors - 1;
    if (gradients && matters && wants_gradients(s, argument)) return false;
    const int64_t aligned = int64_t(reinterpret_cast<uintptr_t>(t.data) % 16);
    key.push_back(1 | int64_t(t.ndim) << 8 | int64_t(t.code) << 16 | int64_t(t.bits) << 24 | aligned << 32);
    key.push_back(int64_t(t.device_type) << 32 | uint32_t(t.device_id));
    for (int d = 0; d < t.ndim; ++d) key.push_back(t.shape[d]), key.push_back(t.strides[d]);
  }
  for (int place : kScalars) {
    PyObject* scalar = args[place];
    if (scalar == Py_None || PyBool_Check(scalar)) {
      key.push_back(scalar == Py_None ? 1 : 2 + (scalar == Py_True));
      key.push_back(0);
    } else if (PyLong_CheckExact(scalar)) {
      int overflow = 0;
      key.push_back(4);
      key.push_back(PyLong_AsLongLongAndOverflow(scalar, &overflow));
      if (overflow != 0) return false;
    } else if (PyFloat_CheckExact(scalar)) {
      const double value = PyFloat_AS_DOUBLE(scalar);
      std::memcpy(&word, &value, sizeof word);
      key.push_back(5);
      key.push_back(word);
    } else {
      return false;
    }
  }
  return true;
}

void span_of(const DlTensor& t, uintptr_t* first, uintptr_t* end) {
  int64_t last = 0;
  for (int d = 0; d < t.ndim; ++d) last += (t.shape[d] - 1) * t.strides[d];
  *first = reinterpret_cast<uintptr_t>(t.data);
  *end = *first + uintptr_t(last + 1) * t.bits / 8;
}

bool out_is_near_an_input(const DlTensor* read) {
  uintptr_t first, end, from, to;
  span_of(read[kNumTensors - 1], &first, &end);
  for (int i = 0; i < kNumTensors - 1; ++i) {
    if (read[i].data == nullptr) continue;
    span_of(read[i], &from, &to);
    if (from < end && first < to) return true;
  }
  return false;
}

PyObject* allocate(const State& s, const py::object& shape, const py::object& dtype, const py::object& device,
                   void** data) {
  PyObject* const args[] = {shape.ptr(), dtype.ptr(), device.ptr()};
  PyObject* made = PyObject_Vectorcall(s.empty, args, 1, s.empty_keywords);
  DlTensor t;
  if (made == nullptr || s.exchange->tensor_of(made, &t) != 0) {
    Py_XDECREF(made);
    PyErr_Clear();  // the long way fails in the same place and says so
    return nullptr;
  }
  *data = static_cast<char*>(t.data) + t.byte_offset;
  return made;
}

// The result, or null without an error: the call has to go the long way.
PyObject* serve(State& s, Entry& entry, PyObject* const* args, const DlTensor* read) {
  const DlTensor& given = read[kNumTensors - 1];
  if (given.data != nullptr && out_is_near_an_input(read)) return nullptr;
  void* stream = nullptr;
  if (read[0].device_type == kDlCuda && s.exchange->current_stream(kDlCuda, read[0].device_id, &stream) != 0) {
    return PyErr_Clear(), nullptr;
  }
  DecodeLaunch launch = entry.launch;
  py::object out, lse, workspace;
  void *out_data = given.data, *lse_data = nullptr, *workspace_data = nullptr;
  if (given.data != nullptr) {
    out = py::reinterpret_borrow<py::object>(args[kOut]);
  } else {
    out = py::reinterpret_steal<py::object>(allocate(s, entry.out_shape, entry.dtype, entry.device, &out_data));
    if (!out) return nullptr;
  }
  if (entry.return_lse) {
    lse = py::reinterpret_steal<py::object>(allocate(s, entry.lse_shape, entry.float32, entry.device, &lse_data));
    if (!lse) return nullptr;
  }
  if (launch.needs_combine()) {
    workspace = py::reinterpret_steal<py::object>(
        allocate(s, entry.workspace_shape, entry.float32, entry.device, &workspace_data));
    if (!workspace) return nullptr;
  }
  DecodeParams& p = launch.decode;
  p.q = read[0].data, p.k = read[1].data, p.v = read[2].data;
  p.selection = read[3].data != nullptr ? read[3].data : read[4].data;
  p.counts = static_cast<const int32_t*>(read[5].data), p.seq_lens = static_cast<const int32_t*>(read[6].data);
  p.block_table = static_cast<const int32_t*>(read[7].data), p.table_rows = static_cast<const int32_t*>(read[8].data);
  p.out = launch.combine.out = out_data;
  p.lse = launch.combine.lse = static_cast<float*>(lse_data);
  launch.set_workspace(static_cast<float*>(workspace_data));
  int code = -1;
  try {
    py::gil_scoped_release release;
    if (s.launcher != nullptr) {
      code = s.launcher(&launch, entry.device_index, stream);
    } else {
#if NSA_SEL_HAS_KERNELS
      code = run_decode(launch, entry.device_index, stream);
#endif
    }
  } catch (const std::exception&) {
    return nullptr;  // a kernel that cannot be loaded: the long way says why
  }
  if (code != 0) return nullptr;
  ++*entry.count;
  return entry.return_lse ? PyTuple_Pack(2, out.ptr(), lse.ptr()) : out.release().ptr();
}

PyObject* attend(PyObject*, PyObject* const* args, Py_ssize_t nargs, PyObject* names) {
  State& s = state();
  Key key;
  bool keyed = false;
  if (nargs == kPositional && known_keywords(s, names)) {
    DlTensor read[kNumTensors];
    key.reserve(112);
    keyed = describe(s, args, read, key);
    if (keyed) {
      const auto found = s.entries.find(key);
      if (found != s.entries.end()) {
        const std::shared_ptr<Entry> entry = found->second;  // what runs in between may empty the cache
        if (PyObject* result = serve(s, *entry, args, read)) return result;
        if (PyErr_Occurred()) return nullptr;
      }
    }
  }
  offered.reset(), confirmed.reset();
  const uint64_t epoch = s.epoch;
  PyObject* result = PyObject_Vectorcall(s.slow, args, size_t(nargs), names);
  std::shared_ptr<Entry> entry = std::move(confirmed);
  offered.reset(), confirmed.reset();
  if (result != nullptr && keyed && entry && epoch == s.epoch) {
    if (s.entries.size() >= kMostEntries) s.entries.clear();
    s.entries[std::move(key)] = std::move(entry);
  }
  return result;
}

PyMethodDef attend_method = {
    "attend", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&attend)), METH_FASTCALL | METH_KEYWORDS,
    "Runs a call: straight to its launch where one like it has run, else by the function set up."};

int do_nothing(const DecodeLaunch*, int, void*) { return 0; }

}  // namespace

void bind_call_cache(py::module_& m) {
  m.def(
      "set_up_calls",
      [](py::object slow, py::object tensor, py::object parameter, py::object empty, py::object grad_enabled,
         py::object function_modes, py::object forward_ad) {
        State& s = state();
        if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return false;
        py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
        const auto* exchange =
            static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (exchange == nullptr) throw py::error_already_set();
        if (exchange->major != 1 || exchange->tensor_of == nullptr) return false;
        s.exchange = exchange;
        s.slow = slow.release().ptr(), s.tensor = tensor.release().ptr(), s.parameter = parameter.release().ptr();
        s.empty = empty.release().ptr(), s.grad_enabled = grad_enabled.release().ptr();
        s.function_modes = function_modes.release().ptr(), s.forward_ad = forward_ad.release().ptr();
        s.current_level = PyUnicode_InternFromString("_current_level");
        s.requires_grad = PyUnicode_InternFromString("requires_grad");
        s.empty_keywords = py::make_tuple("dtype", "device").release().ptr();
        return true;
      },
      "Tells `attend` what Python has for it; False where torch has no DLPack exchange interface.");
  m.add_object("attend", PyCFunction_NewEx(&attend_method, nullptr, nullptr));
  m.def(
      "offer_launch",
      [](const DecodeLaunch& launch, int device_index, py::object out_shape, py::object lse_shape, py::object dtype,
         py::object float32, py::object device) {
        auto entry = std::make_shared<Entry>();
        entry->launch = launch;
        entry->device_index = device_index;
        entry->return_lse = launch.decode.lse != nullptr;
        entry->out_shape = std::move(out_shape), entry->lse_shape = std::move(lse_shape);
        entry->workspace_shape = py::make_tuple(launch.plan.workspace_floats);
        entry->dtype = std::move(dtype), entry->float32 = std::move(float32), entry->device = std::move(device);
        offered = std::move(entry);
      },
      "Offers the launch of the call that now runs in this thread, for calls like it.");
  m.def(
      "confirm_launch",
      [](const std::string& backend, const std::string& reason) {
        if (!offered) return;
        offered->count = &state().counts[{backend, reason}];
        confirmed = std::move(offered);
      },
      "Takes the offer, once the call has run; calls like it count under this backend and reason.");
  m.def("forget_launches", [] { ++state().epoch, state().entries.clear(); }, "Empties the cache.");
  m.def("num_launches", [] { return state().entries.size(); }, "How many signatures the cache holds.");
  m.def(
      "served",
      [] {
        py::list found;
        for (const auto& [why, count] : state().counts) {
          if (count > 0) found.append(py::make_tuple(why.first, why.second, count));
        }
        return found;
      },
      "(backend, reason, calls) of what was served.");
  m.def("reset_served", [] {
    for (auto& [why, count] : state().counts) count = 0;
  });
  m.def(
      "replace_launches",
      [](std::uintptr_t function) {
        state().launcher =
            function == 1 ? &do_nothing : reinterpret_cast<int (*)(const DecodeLaunch*, int, void*)>(function);
      },
      "Launches by a C function (launch, device, stream) instead of the driver; 1: by none; 0: by the driver again.",
      py::arg("function"));
}

}  // namespace nsa_sel
