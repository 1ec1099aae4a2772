// call_cache.cpp - a call whose arguments look like those of an earlier one goes straight to that call's launch.
//
// Checking, routing and planning look at types, shapes, strides, dtypes, devices, alignment and scalars, never at
// values. So a call with the same signature has the same outcome: its tensors are read (call_tensor.h), its signature
// is looked up, the results are allocated, the launch gets the new addresses. What is not plain, a subclass, a
// gradient, a mode, an `out` near an input, goes to Python, as does every error. All of it runs under the GIL, but for
// the launch.
#include "call_cache.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "call_tensor.h"
#include "dispatch.h"
#include "launch.h"

namespace py = pybind11;

namespace nsa_sel {
namespace {

constexpr size_t kMostEntries = 1024;
constexpr int kMostArguments = 24;

// Where the address of an argument goes; it is one of the two selections, and the other is null.
struct Place {
  const char* argument;
  size_t offset;
};
constexpr Place kPlaces[] = {
    {"q", offsetof(DecodeParams, q)},
    {"k", offsetof(DecodeParams, k)},
    {"v", offsetof(DecodeParams, v)},
    {"ranges", offsetof(DecodeParams, selection)},
    {"block_indices", offsetof(DecodeParams, selection)},
    {"counts", offsetof(DecodeParams, counts)},
    {"seq_lens", offsetof(DecodeParams, seq_lens)},
    {"block_table", offsetof(DecodeParams, block_table)},
    {"table_rows", offsetof(DecodeParams, table_rows)},
    {"k_scale", offsetof(DecodeParams, k_scale.values)},
    {"v_scale", offsetof(DecodeParams, v_scale.values)},
};
constexpr ptrdiff_t kNowhere = -1;

// What the signature of a call is: one word or more per argument, the first of which says how many follow.
struct Signature {
  int64_t words[kMostArguments * (1 + 2 * kMostDims)];
  int size = 0;
  void add(int64_t word) { words[size++] = word; }

  uint64_t hash() const {  // in chains, so that one multiplication need not wait for the other
    uint64_t h[4] = {1, 2, 3, 4};
    int i = 0;
    for (; i + 4 <= size; i += 4) {
      for (int chain = 0; chain < 4; ++chain) h[chain] = mixed(h[chain], words[i + chain]);
    }
    for (; i < size; ++i) h[0] = mixed(h[0], words[i]);
    return mixed(mixed(mixed(h[0], int64_t(h[1])), int64_t(h[2])), int64_t(h[3]));
  }
  static uint64_t mixed(uint64_t h, int64_t word) { return h = (h ^ uint64_t(word)) * 1099511628211ull, h ^ h >> 29; }
};
enum Tag { kNone, kTensor, kFalse, kTrue, kInt, kFloat, kText };

struct Entry {
  std::vector<int64_t> signature;
  DecodeLaunch launch;
  py::object out_shape, lse_shape, workspace_shape;  // tuples
  py::object float32;                                // an empty tensor whose likes lse and workspace are; or None
  bool like_q = false, return_lse = false;
  int device_index = 0;
  uint64_t* count = nullptr;

  bool is(const Signature& s) const {
    return size_t(s.size) == signature.size() && std::memcmp(s.words, signature.data(), s.size * sizeof(int64_t)) == 0;
  }
};

// Never destroyed: its objects may outlive the interpreter.
struct State {
  PyObject *slow = nullptr, *tensor = nullptr, *parameter = nullptr, *grad_enabled = nullptr;
  PyObject *modes = nullptr, *forward_ad = nullptr, *current_level = nullptr;
  PyObject *new_empty = nullptr, *empty_like = nullptr;
  TensorReader reader;
  int num_arguments = 0, q = 0, out = 0;
  ptrdiff_t places[kMostArguments];
  uint64_t epoch = 0;
  std::unordered_map<uint64_t, std::shared_ptr<Entry>> entries;  // by the hash of the signature: one for each
  std::map<std::pair<std::string, std::string>, uint64_t> counts;
  int (*launcher)(const DecodeLaunch*, int, void*) = nullptr;  // instead of the driver, for tests and benchmarks
};
State& state() {
  static State* made = new State;
  return *made;
}

// What a call on the long way hands to the `attend` that waits for it, on its stack: an object left in a thread would
// be destroyed without the interpreter.
struct Offer {
  std::shared_ptr<Entry> made, confirmed;
};
thread_local Offer* awaited = nullptr;  // null where a call came in elsewhere, as one operator

bool plain_zero(PyObject* function) {
  PyObject* result = PyObject_CallNoArgs(function);
  if (result == nullptr) return PyErr_Clear(), false;
  const bool zero = PyObject_Not(result) == 1;
  Py_DECREF(result);
  return zero;
}

bool watched(const State& s) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(s.modes); ++i) {
    if (!plain_zero(PyTuple_GET_ITEM(s.modes, i))) return true;
  }
  PyObject* level = PyDict_GetItemWithError(s.forward_ad, s.current_level);
  if (level == nullptr) return PyErr_Clear(), true;
  return PyLong_AsLong(level) != -1 || PyErr_Occurred() != nullptr;
}

bool add_scalar(PyObject* value, Signature& signature) {
  int64_t word = 0;
  if (PyBool_Check(value)) {
    signature.add(value == Py_True ? kTrue : kFalse);
    return true;
  }
  if (PyLong_CheckExact(value)) {
    int overflow = 0;
    word = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow != 0) return false;
    signature.add(kInt);
  } else if (PyFloat_CheckExact(value)) {
    const double number = PyFloat_AS_DOUBLE(value);
    std::memcpy(&word, &number, sizeof word);
    signature.add(kFloat);
  } else if (PyUnicode_CheckExact(value)) {
    Py_ssize_t bytes = 0;
    const char* text = PyUnicode_AsUTF8AndSize(value, &bytes);
    if (text == nullptr || bytes > 8) return PyErr_Clear(), false;
    std::memcpy(&word, text, size_t(bytes));
    signature.add(kText | bytes << 8);
  } else {
    return false;
  }
  signature.add(word);
  return true;
}

// Reads the arguments into `signature` and the tensors into `read`; false: not a call that may be served.
bool describe(const State& s, PyObject* const* args, CallTensor* read, Signature& signature) {
  if (watched(s)) return false;
  bool requires_grad = false;
  for (int i = 0; i < s.num_arguments; ++i) {
    PyObject* argument = args[i];
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(argument));
    read[i].data = nullptr;
    if (argument == Py_None) {
      signature.add(kNone);
    } else if (type == s.tensor || type == s.parameter) {
      CallTensor& t = read[i];
      if ((s.places[i] == kNowhere && i != s.out) || !s.reader.read(argument, &t)) return false;
      requires_grad |= t.requires_grad;
      const int64_t aligned = int64_t(reinterpret_cast<uintptr_t>(t.data) % 16);
      signature.add(kTensor | int64_t(t.ndim) << 4 | aligned << 8 | int64_t(t.dtype) << 16 | int64_t(t.device) << 32);
      for (int d = 0; d < t.ndim; ++d) signature.add(t.shape[d]), signature.add(t.strides[d]);
    } else if (!add_scalar(argument, signature)) {
      return false;
    }
  }
  return !requires_grad || plain_zero(s.grad_enabled);
}

void span_of(const CallTensor& t, uintptr_t* first, uintptr_t* end) {
  int64_t last = 0;
  for (int d = 0; d < t.ndim; ++d) last += (t.shape[d] - 1) * t.strides[d];
  *first = reinterpret_cast<uintptr_t>(t.data);
  *end = *first + uintptr_t(last + 1) * t.element_bytes();
}

bool out_is_near_an_input(const State& s, const CallTensor* read) {
  uintptr_t first, end, from, to;
  span_of(read[s.out], &first, &end);
  for (int i = 0; i < s.num_arguments; ++i) {
    if (i == s.out || read[i].data == nullptr) continue;
    span_of(read[i], &from, &to);
    if (from < end && first < to) return true;
  }
  return false;
}

// A new tensor by a method of `like`: of all ways to allocate from Python those that torch parses fastest.
py::object allocate(const State& s, PyObject* like, PyObject* shape, void** data) {
  PyObject* args[1 + kMostDims] = {like};
  const Py_ssize_t dims = shape == nullptr ? 0 : PyTuple_GET_SIZE(shape);
  for (Py_ssize_t d = 0; d < dims; ++d) args[1 + d] = PyTuple_GET_ITEM(shape, d);
  PyObject* made = PyObject_Vectorcall(shape == nullptr ? s.empty_like : s.new_empty, args, size_t(1 + dims), nullptr);
  if (made == nullptr) return PyErr_Clear(), py::object();  // the long way fails in the same place and says so
  *data = s.reader.address(made);
  return *data != nullptr ? py::reinterpret_steal<py::object>(made) : (Py_DECREF(made), py::object());
}

// The result, or null without an error: the call has to go the long way.
PyObject* serve(State& s, const Entry& entry, PyObject* const* args, const CallTensor* read) {
  const CallTensor& given = read[s.out];
  if (given.data != nullptr && out_is_near_an_input(s, read)) return nullptr;
  void* stream = nullptr;
  if (!s.reader.current_stream(read[s.q], &stream)) return nullptr;
  DecodeLaunch launch = entry.launch;
  py::object out, lse, workspace;
  void *out_data = given.data, *lse_data = nullptr, *workspace_data = nullptr;
  if (given.data != nullptr) {
    out = py::reinterpret_borrow<py::object>(args[s.out]);
  } else if (!(out = allocate(s, args[s.q], entry.like_q ? nullptr : entry.out_shape.ptr(), &out_data))) {
    return nullptr;
  }
  if (entry.return_lse && !(lse = allocate(s, entry.float32.ptr(), entry.lse_shape.ptr(), &lse_data))) return nullptr;
  if (launch.needs_combine() &&
      !(workspace = allocate(s, entry.float32.ptr(), entry.workspace_shape.ptr(), &workspace_data))) {
    return nullptr;
  }
  DecodeParams& p = launch.decode;
  for (int i = 0; i < s.num_arguments; ++i) {
    if (read[i].data != nullptr && s.places[i] != kNowhere) {
      std::memcpy(reinterpret_cast<char*>(&p) + s.places[i], &read[i].data, sizeof(void*));
    }
  }
  p.out = launch.combine.out = out_data;
  p.lse = launch.combine.lse = static_cast<float*>(lse_data);
  launch.set_workspace(static_cast<float*>(workspace_data));

  int code = -1;  // stays where a kernel cannot be loaded: the long way says why
  PyThreadState* thread = PyEval_SaveThread();
  try {
    code = nsa_sel::launch(launch, entry.device_index, stream);
  } catch (const std::exception&) {
  }
  PyEval_RestoreThread(thread);
  if (code != 0) return nullptr;
  ++*entry.count;
  return entry.return_lse ? PyTuple_Pack(2, out.ptr(), lse.ptr()) : out.release().ptr();
}

PyObject* attend(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  State& s = state();
  Signature signature;
  uint64_t hash = 0;
  bool known = false;
  if (nargs == s.num_arguments) {
    CallTensor read[kMostArguments];
    known = describe(s, args, read, signature);
    if (known) {
      hash = signature.hash();
      const auto found = s.entries.find(hash);
      if (found != s.entries.end() && found->second->is(signature)) {
        const std::shared_ptr<Entry> entry = found->second;  // what runs in between may empty the cache
        if (PyObject* result = serve(s, *entry, args, read)) return result;
        if (PyErr_Occurred()) return nullptr;
      }
    }
  }
  Offer offer;
  Offer* const outer = std::exchange(awaited, known ? &offer : nullptr);
  const uint64_t epoch = s.epoch;
  PyObject* result = PyObject_Vectorcall(s.slow, args, size_t(nargs), nullptr);
  awaited = outer;
  if (result != nullptr && offer.confirmed && epoch == s.epoch) {
    if (s.entries.size() >= kMostEntries) s.entries.clear();
    offer.confirmed->signature.assign(signature.words, signature.words + signature.size);
    s.entries[hash] = std::move(offer.confirmed);
  }
  return result;
}

PyMethodDef attend_method = {
    "attend", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&attend)), METH_FASTCALL,
    "Runs a call: straight to its launch where one like it has run, else by the function set up."};

int do_nothing(const DecodeLaunch*, int, void*) { return 0; }

void set_up(py::object slow, const py::tuple& arguments, py::tuple modes, const py::module_& torch,
            py::object forward_ad, bool exchange) {
  State& s = state();
  if (arguments.size() > kMostArguments) throw std::invalid_argument("arguments: too many for call_cache.cpp");
  s.num_arguments = 0, s.out = -1, s.q = -1;
  for (const py::handle& argument : arguments) {
    const auto name = py::cast<std::string>(argument);
    ptrdiff_t place = kNowhere;
    for (const Place& known : kPlaces) {
      if (name == known.argument) place = ptrdiff_t(known.offset);
    }
    if (name == "q") s.q = s.num_arguments;
    if (name == "out") s.out = s.num_arguments;
    s.places[s.num_arguments++] = place;
  }
  if (s.q < 0 || s.out < 0) throw std::invalid_argument("arguments: expected q and out among them");
  s.reader.set_up(torch, exchange);
  s.tensor = torch.attr("Tensor").ptr();  // torch keeps these alive
  s.parameter = torch.attr("nn").attr("Parameter").ptr();
  s.new_empty = kept(torch.attr("Tensor"), "new_empty");
  s.empty_like = kept(torch, "empty_like");
  s.grad_enabled = kept(torch, "is_grad_enabled");
  s.slow = slow.release().ptr(), s.modes = modes.release().ptr(), s.forward_ad = kept(forward_ad, "__dict__");
  s.current_level = PyUnicode_InternFromString("_current_level");
}

}  // namespace

int launch(const DecodeLaunch& planned, int device, void* stream) {
  if (state().launcher != nullptr) return state().launcher(&planned, device, stream);
#if NSA_SEL_HAS_KERNELS
  return run_decode(planned, device, stream);
#else
  throw std::runtime_error("kernels: expected a build that has them, got none: " NSA_SEL_NO_KERNELS_REASON);
#endif
}

void bind_call_cache(py::module_& m) {
  m.def("set_up_calls", &set_up,
        "Tells `attend` its arguments by name, what runs a call the long way, the functions that say that a mode is "
        "on, and whether to read tensors through torch's DLPack exchange interface.",
        py::arg("slow"), py::arg("arguments"), py::arg("modes"), py::arg("torch"), py::arg("forward_ad"),
        py::arg("exchange"));
  m.add_object("attend", PyCFunction_NewEx(&attend_method, nullptr, nullptr));
  m.def(
      "offer_launch",
      [](const DecodeLaunch& launch, int device_index, py::tuple out_shape, bool like_q, py::object float32) {
        if (awaited == nullptr) return;
        auto entry = std::make_shared<Entry>();
        entry->launch = launch;
        entry->device_index = device_index, entry->like_q = like_q;
        entry->return_lse = launch.decode.lse != nullptr;
        if (entry->return_lse) entry->lse_shape = out_shape[py::slice(0, ptrdiff_t(out_shape.size()) - 1, 1)];
        if (launch.needs_combine()) entry->workspace_shape = py::make_tuple(launch.plan.workspace_floats);
        entry->out_shape = std::move(out_shape), entry->float32 = std::move(float32);
        awaited->made = std::move(entry);
      },
      "Offers the launch of the call that now runs in this thread, for calls like it: `like_q` where out is laid out "
      "as "
      "q is, `float32` an empty tensor on its device.");
  m.def(
      "confirm_launch",
      [](const std::string& backend, const std::string& reason) {
        if (awaited == nullptr || !awaited->made) return;
        awaited->made->count = &state().counts[{backend, reason}];
        awaited->confirmed = std::move(awaited->made);
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
