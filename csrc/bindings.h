// How Python calls a launcher f(stream, args...): as f(*args). Tensors arrive through the DLPack C exchange table, so
// no torch header is included and one build works with every torch that has the table (2.10+). The functions of a
// module are defined by pybind11 (bindings_pybind11.h), or, where Py_LIMITED_API is defined, by Python's C API alone
// (bindings_limited.h), so that one build works with every Python from 3.10 on. A module is
//
//     LING_BINDINGS(m) { def(m, "name", function); ... }
#pragma once
#ifdef Py_LIMITED_API
#include <Python.h>
#else
#include <pybind11/pybind11.h>
#endif
#include <dlpack/dlpack.h>  // from the apache-tvm-ffi wheel: build time only

#include <algorithm>
#include <optional>
#include <string_view>

#include "tensor.h"

#ifndef LING_DEVICE  // tests/gpu defines it as kDLCPU
#define LING_DEVICE kDLCUDA
#endif

struct PythonError {};  // thrown where a Python exception is set

// A new reference, or a PythonError.
class Owned {
    PyObject* object;

public:
    explicit Owned(PyObject* new_reference) : object(new_reference) {
        if (!object) throw PythonError{};
    }
    ~Owned() { Py_DECREF(object); }
    Owned(const Owned&) = delete;
    operator PyObject*() const { return object; }
};

static bool has_text(PyObject* object, std::string_view text) {  // whether str(object) is the text
    const Owned shown(PyObject_Str(object));
    Py_ssize_t size;
    const char* chars = PyUnicode_AsUTF8AndSize(shown, &size);
    if (!chars) throw PythonError{};
    return text == std::string_view(chars, size);
}

// Looked up at the first call: importing _C must not need torch.
static const DLPackExchangeAPI& dlpack() {
    static const auto* api = [] {
        const Owned torch(PyImport_ImportModule("torch"));
        const Owned type(PyObject_GetAttrString(torch, "Tensor"));
        const DLPackExchangeAPI* found = nullptr;
        if (PyObject_HasAttrString(type, "__dlpack_c_exchange_api__")) {
            const Owned table(PyObject_GetAttrString(type, "__dlpack_c_exchange_api__"));
            found = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(table, "dlpack_exchange_api"));
            if (!found) throw PythonError{};
        }
        if (!found || found->header.version.major != DLPACK_MAJOR_VERSION)
            throw std::runtime_error("this torch has no DLPack 1.x exchange table; torch 2.10 or newer has");
        return found;
    }();
    return *api;
}

static ling::DType to_dtype(DLDataType t) {
    using enum ling::DType;
    switch (t.code << 8 | t.bits) {
        case kDLFloat << 8 | 32: return f32;
        case kDLFloat << 8 | 16: return f16;
        case kDLBfloat << 8 | 16: return bf16;
        case kDLFloat8_e4m3fn << 8 | 8: return e4m3;
        case kDLInt << 8 | 32: return i32;
        case kDLInt << 8 | 64: return i64;
        case kDLUInt << 8 | 8: return u8;
    }
    throw std::invalid_argument("no kernel takes a tensor of this dtype");
}

static bool is_float8(PyObject* tensor) {
    if (!PyObject_HasAttrString(tensor, "dtype")) return false;
    const Owned dtype(PyObject_GetAttrString(tensor, "dtype"));
    return has_text(dtype, "torch.float8_e4m3fn");
}

// A torch.Tensor, or None.
static ling::Tensor to_tensor(PyObject* object) {
    if (object == Py_None) return {};
    DLTensor t;
    std::optional<Owned> bytes;  // the view of a float8 tensor, in case the table of this torch refuses the dtype
    if (dlpack().dltensor_from_py_object_no_sync(object, &t)) {
        PyErr_Clear();
        if (is_float8(object)) {
            const Owned torch(PyImport_ImportModule("torch"));
            const Owned uint8(PyObject_GetAttrString(torch, "uint8"));
            bytes.emplace(PyObject_CallMethod(object, "view", "O", static_cast<PyObject*>(uint8)));
        }
        if (dlpack().dltensor_from_py_object_no_sync(bytes ? *bytes : object, &t)) throw PythonError{};
        if (bytes) t.dtype = {kDLFloat8_e4m3fn, 8, 1};
    }
    if (t.device.device_type != LING_DEVICE || t.ndim > 5)
        throw std::invalid_argument("expected a tensor of at most 5 dimensions on a GPU");
    ling::Tensor tensor{static_cast<char*>(t.data) + t.byte_offset, to_dtype(t.dtype), t.ndim, t.device.device_id};
    std::copy_n(t.shape, t.ndim, tensor.shape);
    std::copy_n(t.strides, t.ndim, tensor.stride);
    return tensor;
}

// Makes the GPU that holds the tensors the current one during its lifetime.
class OnDevice {
    int before = -1, here = -1;
    void see(const ling::Tensor& t) {
        if (here >= 0 && t.device >= 0 && t.device != here) throw std::invalid_argument("expected tensors on one GPU");
        here = std::max(here, t.device);
    }
    template <typename T> void see(const T&) {}  // scalars

public:
    template <typename... Args> explicit OnDevice(const Args&... args) {
        (see(args), ...);
        LING_CUDA_CHECK(cudaGetDevice(&before));
        if (here < 0) here = before;
        if (here != before) LING_CUDA_CHECK(cudaSetDevice(here));
    }
    ~OnDevice() {
        if (here != before) cudaSetDevice(before);
    }
    OnDevice(const OnDevice&) = delete;
    operator int() const { return here; }
};

// On torch's current stream of the device that holds the tensors.
template <typename... Args> static void launch(void (*launcher)(cudaStream_t, Args...), Args... args) {
    const OnDevice device(args...);
    void* stream;
    if (dlpack().current_work_stream(LING_DEVICE, device, &stream)) throw PythonError{};
    launcher(static_cast<cudaStream_t>(stream), args...);
}

#ifdef Py_LIMITED_API
#include "bindings_limited.h"
#else
#include "bindings_pybind11.h"
#endif
