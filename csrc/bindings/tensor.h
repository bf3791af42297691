// A torch tensor as an argument of a binding: its memory, shape, strides and dtype, read through
// DLPack's table of C functions, which torch has had since 2.10. Nothing of torch is included or
// linked, and it costs a fraction of asking in Python for addresses and strides.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../ops.h"

// The part of DLPack 1.3's C ABI that is used here (dmlc.github.io/dlpack, "C API"); the layout of
// what stands before it is fixed within a major version.
namespace llama2rt::dlpack {

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
constexpr uint8_t INT = 0, FLOAT = 2, BFLOAT = 4;

struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* tensor);  // borrows; 0, or a Python error is set
  void* current_stream;
};

// That of a tensor's type, null for what is no tensor. One type of tensor is used: torch's.
inline const ExchangeApi* exchange_api(pybind11::handle object) {
  namespace py = pybind11;
  const py::object capsule =
      py::getattr(py::type::handle_of(object), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_CheckExact(capsule.ptr())) return nullptr;
  const void* api = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (api == nullptr) throw py::error_already_set();
  return static_cast<const ExchangeApi*>(api);
}

}  // namespace llama2rt::dlpack

namespace llama2rt {

// A tensor. It is valid until the call returns: its owner is one of the call's arguments.
struct Tensor {
  dlpack::Tensor of = {};

  int64_t size(int dimension) const {
    if (dimension >= of.rank) throw std::invalid_argument("a tensor has too few dimensions");
    return of.shape[dimension];
  }
  int64_t stride(int dimension) const { return size(dimension), of.strides[dimension]; }
  int64_t items() const {
    int64_t count = 1;
    for (int i = 0; i < of.rank; ++i) count *= of.shape[i];
    return count;
  }

  bool is(uint8_t code, uint8_t bits) const {
    return of.dtype.code == code && of.dtype.bits == bits && of.dtype.lanes == 1;
  }
  DType dtype() const {
    if (is(dlpack::FLOAT, 32)) return DType::fp32;
    if (is(dlpack::BFLOAT, 16)) return DType::bf16;
    if (is(dlpack::FLOAT, 16)) return DType::fp16;
    throw std::invalid_argument("a kernel takes float32, bfloat16 or float16 tensors");
  }
  bool is_int64() const {
    if (!is(dlpack::INT, 64) && !is(dlpack::INT, 32))
      throw std::invalid_argument("indices are int32 or int64");
    return of.dtype.bits == 64;
  }

  void* data() const { return of.data; }
  float* floats() const {
    if (of.data && !is(dlpack::FLOAT, 32)) throw std::invalid_argument("statistics are float32");
    return static_cast<float*>(of.data);
  }
  Matrix matrix() const {
    return of.data ? Matrix{of.data, stride(0)} : Matrix{nullptr, 0};
  }
  Heads heads() const { return {of.data, stride(0), stride(1)}; }
  Pages pages() const { return {of.data, stride(0), stride(1), stride(2)}; }
  Indices indices() const { return {of.data, is_int64()}; }
};

// A tensor, or None, whose address is null.
struct Optional : Tensor {};

}  // namespace llama2rt

namespace pybind11::detail {

template <>
struct type_caster<llama2rt::Tensor> {
  PYBIND11_TYPE_CASTER(llama2rt::Tensor, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    // Looking the table up costs more than using it: done once for a tensor and once for a parameter,
    // whose types are kept alive, so that no other type can have their addresses.
    static const llama2rt::dlpack::ExchangeApi* api = nullptr;
    static PyTypeObject* known[2] = {};
    static int next = 0;
    PyTypeObject* type = Py_TYPE(source.ptr());
    if (type != known[0] && type != known[1]) {
      const auto* found = llama2rt::dlpack::exchange_api(source);
      if (found == nullptr) return false;
      if (found->major != 1 || found->tensor_from_object == nullptr)
        throw std::runtime_error("torch exchanges tensors by another DLPack than version 1");
      api = found;
      Py_INCREF(type);
      known[next] = type;
      next ^= 1;
    }
    if (api->tensor_from_object(source.ptr(), &value.of) != 0) throw error_already_set();
    // torch 2.13 exchanges a FakeTensor, or a subclass that only wraps others, as a CPU tensor at
    // address 0, without an error.
    if (value.of.data == nullptr && value.items() > 0)
      throw std::invalid_argument("a tensor has no memory: it is a fake one, or stands for others");
    return true;
  }
};

template <>
struct type_caster<llama2rt::Optional> {
  PYBIND11_TYPE_CASTER(llama2rt::Optional, const_name("torch.Tensor | None"));

  bool load(handle source, bool convert) {
    if (source.is_none()) return true;
    type_caster<llama2rt::Tensor> tensor;
    if (!tensor.load(source, convert)) return false;
    static_cast<llama2rt::Tensor&>(value) = tensor;
    return true;
  }
};

}  // namespace pybind11::detail
