// The functions of a module, by pybind11.
#pragma once
#include <pybind11/pybind11.h>

#define LING_BINDINGS(m) PYBIND11_MODULE(LING_MODULE, m)

template <typename F> static auto with_python_errors(F f) {
    try {
        return f();
    } catch (const PythonError&) { throw pybind11::error_already_set(); }
}

template <> struct pybind11::detail::type_caster<ling::Tensor> {
    PYBIND11_TYPE_CASTER(ling::Tensor, const_name("torch.Tensor"));

    bool load(handle src, bool) {
        value = with_python_errors([&] { return to_tensor(src.ptr()); });
        return true;
    }
};

template <typename... Args>
static void def(pybind11::module_& m, const char* name, void (*launcher)(cudaStream_t, Args...)) {
    m.def(name, [launcher](Args... args) { with_python_errors([&] { launch(launcher, args...); }); });
}

template <typename R, typename... Args> static void def(pybind11::module_& m, const char* name, R (*f)(Args...)) {
    m.def(name, f);
}
