#include "call_tensor.h"

#include <stdexcept>

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
constexpr int32_t kDlCpu = 1, kDlCuda = 2;
constexpr uint8_t kDlInt = 0, kDlFloat = 2, kDlBfloat = 4, kDlFloat8e4m3fn = 10;

struct Dtype {
  const char* name;
  uint16_t packed;
};
constexpr Dtype kDtypes[] = {
    {"bfloat16", packed_dtype(kDlBfloat, 16)}, {"float16", packed_dtype(kDlFloat, 16)},
    {"float32", packed_dtype(kDlFloat, 32)},   {"int32", packed_dtype(kDlInt, 32)},
    {"int64", packed_dtype(kDlInt, 64)},       {"float8_e4m3fn", packed_dtype(kDlFloat8e4m3fn, 8)},
};

uint32_t packed_device(int32_t type, int32_t index) { return uint32_t(type) << 16 | uint32_t(index); }
bool is_cuda(uint32_t device) { return device >> 16 == uint32_t(kDlCuda); }
int32_t index_of(uint32_t device) { return int32_t(device & 0xffff); }

PyObject* call(PyObject* method, PyObject* self) { return PyObject_Vectorcall(method, &self, 1, nullptr); }

// What a property gives: straight from its getter, for looking it up by name takes longer.
PyObject* get(PyObject* property, PyObject* self) {
  PyGetSetDef* found = reinterpret_cast<PyGetSetDescrObject*>(property)->d_getset;
  return found->get(self, found->closure);
}

PyObject* checked_property(PyObject* found) {
  if (!Py_IS_TYPE(found, &PyGetSetDescr_Type))
    throw std::invalid_argument("torch.Tensor: expected built-in properties");
  return found;
}

bool is_true(PyObject* found) {  // takes the reference; an error counts as true
  if (found == nullptr) return PyErr_Clear(), true;
  Py_DECREF(found);
  return found != Py_False;
}

bool read_integer(PyObject* found, int64_t* out) {  // takes the reference
  if (found == nullptr) return PyErr_Clear(), false;
  *out = PyLong_AsLongLong(found);
  Py_DECREF(found);
  return *out != -1 || PyErr_Occurred() == nullptr || (PyErr_Clear(), false);
}

// Returns how many integers a tuple holds, written to `out`, or -1; takes the reference.
int read_integers(PyObject* found, int64_t* out) {
  if (found == nullptr) return PyErr_Clear(), -1;
  int size = PyTuple_Check(found) && PyTuple_GET_SIZE(found) <= kMostDims ? int(PyTuple_GET_SIZE(found)) : -1;
  for (int i = 0; i < size; ++i) {
    out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(found, i));
    if (out[i] == -1 && PyErr_Occurred() != nullptr) PyErr_Clear(), size = -1;
  }
  Py_DECREF(found);
  return size;
}

}  // namespace

struct TensorReader::Exchange {
  uint32_t major, minor;
  void* previous;
  void* unused[3];  // managed tensors: an allocator, from and to Python
  int (*tensor_of)(void* object, DlTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

void TensorReader::set_up(const py::module_& torch, bool exchange) {
  const py::object tensor = torch.attr("Tensor");
  exchange_ = nullptr;
  if (exchange && py::hasattr(tensor, "__dlpack_c_exchange_api__")) {
    const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    const void* found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (found == nullptr) throw py::error_already_set();
    const auto* offered = static_cast<const Exchange*>(found);
    if (offered->major == 1 && offered->tensor_of != nullptr) exchange_ = offered;
  }
  is_neg_ = kept(tensor, "is_neg"), data_ptr_ = kept(tensor, "data_ptr");
  stride_ = kept(tensor, "stride"), get_device_ = kept(tensor, "get_device");
  requires_grad_ = checked_property(kept(tensor, "requires_grad")), shape_ = checked_property(kept(tensor, "shape"));
  dtype_ = checked_property(kept(tensor, "dtype")), is_cuda_ = checked_property(kept(tensor, "is_cuda"));
  const py::object C = torch.attr("_C");
  if (py::hasattr(C, "_cuda_getCurrentRawStream")) raw_stream_ = kept(C, "_cuda_getCurrentRawStream");
  dtypes_.clear();
  for (const Dtype& dtype : kDtypes) dtypes_.emplace_back(kept(torch, dtype.name), dtype.packed);
}

bool TensorReader::read(PyObject* tensor, CallTensor* out) const {
  if (!(exchange_ != nullptr ? lend(tensor, out) : read_attributes(tensor, out))) return false;
  if (out->data == nullptr) return false;  // storage freed, zeros that were never written, or empty
  out->requires_grad = false;
  if ((out->dtype & 0xff) == kDlInt) return true;
  out->requires_grad = is_true(get(requires_grad_, tensor));
  return !is_true(call(is_neg_, tensor));  // its memory would hold the negative of its values
}

void* TensorReader::address(PyObject* tensor) const {
  if (exchange_ != nullptr) {
    DlTensor t;
    if (exchange_->tensor_of(tensor, &t) != 0) return PyErr_Clear(), nullptr;
    return static_cast<char*>(t.data) + t.byte_offset;
  }
  int64_t found = 0;
  return read_integer(call(data_ptr_, tensor), &found) ? reinterpret_cast<void*>(found) : nullptr;
}

bool TensorReader::lend(PyObject* tensor, CallTensor* out) const {
  DlTensor t;
  if (exchange_->tensor_of(tensor, &t) != 0) return PyErr_Clear(), false;
  if (t.ndim > kMostDims || t.lanes != 1 || (t.ndim > 0 && (t.shape == nullptr || t.strides == nullptr))) return false;
  out->data = static_cast<char*>(t.data) + t.byte_offset;
  out->ndim = t.ndim, out->dtype = packed_dtype(t.code, t.bits);
  out->device = packed_device(t.device_type, t.device_id);
  out->shape = t.shape, out->strides = t.strides;
  return true;
}

bool TensorReader::read_attributes(PyObject* tensor, CallTensor* out) const {
  int64_t address = 0, index = -1;
  out->ndim = read_integers(get(shape_, tensor), out->own);
  if (out->ndim < 0 || read_integers(call(stride_, tensor), out->own + kMostDims) != out->ndim) return false;
  out->shape = out->own, out->strides = out->own + kMostDims;
  if (!read_integer(call(data_ptr_, tensor), &address) || !read_integer(call(get_device_, tensor), &index))
    return false;
  out->data = reinterpret_cast<void*>(address);
  const bool cuda = index >= 0 && is_true(get(is_cuda_, tensor));
  if (index >= 0 && !cuda) return false;
  out->device = cuda ? packed_device(kDlCuda, int32_t(index)) : packed_device(kDlCpu, 0);
  PyObject* found = get(dtype_, tensor);
  if (found == nullptr) return PyErr_Clear(), false;
  Py_DECREF(found);  // torch has one object for each dtype and keeps it
  for (const auto& [dtype, packed] : dtypes_) {
    if (dtype == found) return out->dtype = packed, true;
  }
  return false;
}

bool TensorReader::current_stream(const CallTensor& tensor, void** stream) const {
  *stream = nullptr;
  if (!is_cuda(tensor.device)) return true;
  if (exchange_ != nullptr) {
    return exchange_->current_stream(kDlCuda, index_of(tensor.device), stream) == 0 || (PyErr_Clear(), false);
  }
  if (raw_stream_ == nullptr) return false;
  PyObject* index = PyLong_FromLong(index_of(tensor.device));
  if (index == nullptr) return PyErr_Clear(), false;
  int64_t handle = 0;
  const bool read = read_integer(call(raw_stream_, index), &handle);
  Py_DECREF(index);
  *stream = reinterpret_cast<void*>(handle);
  return read;
}

}  // namespace nsa_sel
