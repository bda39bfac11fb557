// How Python calls a launcher f(stream, args...): as f(*args). Tensors arrive through the DLPack C exchange table, so
// no torch header is included and one build works with every torch that has the table (2.10+).
#pragma once
#include <dlpack/dlpack.h>  // from the apache-tvm-ffi wheel: build time only
#include <pybind11/pybind11.h>

#include <algorithm>

#include "tensor.h"

#ifndef LING_DEVICE  // tests/gpu defines it as kDLCPU
#define LING_DEVICE kDLCUDA
#endif

namespace py = pybind11;

// Looked up at the first call: importing _C must not need torch.
static const DLPackExchangeAPI& dlpack() {
    static const auto* api = [] {
        const py::object torch = py::module_::import("torch");
        const py::object table = py::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
        const auto* found = static_cast<const DLPackExchangeAPI*>(
            table.is_none() ? nullptr : PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
        if (PyErr_Occurred()) throw py::error_already_set();
        if (!found || found->header.version.major != DLPACK_MAJOR_VERSION)
            throw std::runtime_error("torch " + py::str(torch.attr("__version__")).cast<std::string>() +
                                     " has no DLPack 1.x exchange table; torch 2.10 or newer has");
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

static bool is_float8(py::handle tensor) {
    return py::str(py::getattr(tensor, "dtype", py::none())).cast<std::string>() == "torch.float8_e4m3fn";
}

template <> struct pybind11::detail::type_caster<ling::Tensor> {
    PYBIND11_TYPE_CASTER(ling::Tensor, const_name("torch.Tensor"));

    bool load(handle src, bool) {
        if (src.is_none()) return true;
        DLTensor t;
        object bytes;  // the view of a float8 tensor, in case the table of this torch refuses the dtype
        if (dlpack().dltensor_from_py_object_no_sync(src.ptr(), &t)) {
            const error_already_set refused;
            if (!is_float8(src)) throw refused;
            bytes = src.attr("view")(module_::import("torch").attr("uint8"));
            if (dlpack().dltensor_from_py_object_no_sync(bytes.ptr(), &t)) throw error_already_set();
            t.dtype = {kDLFloat8_e4m3fn, 8, 1};
        }
        if (t.device.device_type != LING_DEVICE || t.ndim > 5)
            throw std::invalid_argument("expected a tensor of at most 5 dimensions on a GPU");
        value = {static_cast<char*>(t.data) + t.byte_offset, to_dtype(t.dtype), t.ndim, t.device.device_id};
        std::copy_n(t.shape, t.ndim, value.shape);
        std::copy_n(t.strides, t.ndim, value.stride);
        return true;
    }
};

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

template <typename... Args> static void def(py::module_& m, const char* name, void (*launch)(cudaStream_t, Args...)) {
    m.def(name, [launch](Args... args) {
        const OnDevice device(args...);
        void* stream;
        if (dlpack().current_work_stream(LING_DEVICE, device, &stream)) throw py::error_already_set();
        launch(static_cast<cudaStream_t>(stream), args...);
    });
}
