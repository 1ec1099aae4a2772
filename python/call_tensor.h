// call_tensor.h - reads address, dtype, device, shape and strides of a torch.Tensor without torch's headers.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace nsa_sel {

constexpr int kMostDims = 5;

// Code, bits and lanes of DLPack in the low, middle and high part.
constexpr uint16_t packed_dtype(uint8_t code, uint8_t bits) { return uint16_t(code | bits << 8); }

struct CallTensor {
  void* data;
  int ndim;
  uint16_t dtype;   // packed_dtype
  uint32_t device;  // type and index
  bool requires_grad;
  const int64_t *shape, *strides;
  int64_t own[2 * kMostDims];  // where shape and strides are not borrowed from the tensor
  unsigned element_bytes() const { return unsigned(dtype >> 8) / 8; }
};

// A reference to an attribute that is never given back.
inline PyObject* kept(const pybind11::object& of, const char* name) {
  return pybind11::object(of.attr(name)).release().ptr();
}

// Tensors are lent by torch's DLPack exchange interface where it has one (from 2.11 on), else read attribute by
// attribute. No Python error is left behind.
class TensorReader {
 public:
  void set_up(const pybind11::module_& torch, bool exchange);
  // False: a tensor that has not its values in memory, or that this cannot read.
  bool read(PyObject* tensor, CallTensor* out) const;
  void* address(PyObject* tensor) const;  // of a new tensor; null: none to be had
  bool current_stream(const CallTensor& tensor, void** stream) const;

 private:
  struct Exchange;
  bool lend(PyObject* tensor, CallTensor* out) const;
  bool read_attributes(PyObject* tensor, CallTensor* out) const;

  const Exchange* exchange_ = nullptr;
  PyObject *requires_grad_ = nullptr, *is_neg_ = nullptr, *raw_stream_ = nullptr;
  PyObject *data_ptr_ = nullptr, *stride_ = nullptr, *get_device_ = nullptr;
  PyObject *shape_ = nullptr, *dtype_ = nullptr, *is_cuda_ = nullptr;
  std::vector<std::pair<PyObject*, uint16_t>> dtypes_;
};

}  // namespace nsa_sel
