// The functions of a module, by the part of Python's C API that does not change from version to version (PEP 384).
#pragma once
#include <Python.h>

#include <array>
#include <limits>
#include <tuple>
#include <utility>

template <typename T> static T from_python(PyObject* object);

template <> ling::Tensor from_python(PyObject* object) { return to_tensor(object); }

template <> bool from_python(PyObject* object) {
    const int value = PyObject_IsTrue(object);
    if (value < 0) throw PythonError{};
    return value;
}

template <> int from_python(PyObject* object) {
    const long value = PyLong_AsLong(object);
    if (value == -1 && PyErr_Occurred()) throw PythonError{};
    if (value != static_cast<int>(value)) throw std::invalid_argument("expected an integer of 32 bits");
    return static_cast<int>(value);
}

template <> float from_python(PyObject* object) {
    const double value = PyFloat_AsDouble(object);
    if (value == -1 && PyErr_Occurred()) throw PythonError{};
    return static_cast<float>(value);
}

static PyObject* to_python(bool value) { return PyBool_FromLong(value); }
static PyObject* to_python(int value) { return PyLong_FromLong(value); }

template <typename... Args> static PyObject* invoke(void (*launcher)(cudaStream_t, Args...), Args... args) {
    launch(launcher, args...);
    Py_INCREF(Py_None);
    return Py_None;
}

template <typename R, typename... Args> static PyObject* invoke(R (*f)(Args...), Args... args) {
    return to_python(f(args...));
}

// `self` is a capsule with the address of the function f.
template <typename F, typename... Args>
static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    try {
        if (count != sizeof...(Args)) {
            PyErr_Format(PyExc_TypeError, "expected %d arguments, not %zd", static_cast<int>(sizeof...(Args)), count);
            return nullptr;
        }
        const auto f = reinterpret_cast<F>(PyCapsule_GetPointer(self, nullptr));
        return [&]<size_t... I>(std::index_sequence<I...>) {
            std::tuple<Args...> values{from_python<Args>(args[I])...};  // braces: from left to right
            return invoke(f, std::get<I>(values)...);
        }(std::index_sequence_for<Args...>());
    } catch (const PythonError&) {
    } catch (const std::invalid_argument& e) {
        PyErr_SetString(PyExc_ValueError, e.what());
    } catch (const std::exception& e) { PyErr_SetString(PyExc_RuntimeError, e.what()); }
    return nullptr;
}

template <typename F, typename... Args> static void add(PyObject* m, const char* name, F f) {
    PyCFunction pointer = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call<F, Args...>));
    auto* method = new PyMethodDef{name, pointer, METH_FASTCALL, nullptr};  // as long as the module: for ever
    const Owned self(PyCapsule_New(reinterpret_cast<void*>(f), nullptr, nullptr));
    const Owned function(PyCFunction_NewEx(method, self, nullptr));
    if (PyModule_AddObjectRef(m, name, function)) throw PythonError{};
}

template <typename... Args> static void def(PyObject* m, const char* name, void (*launcher)(cudaStream_t, Args...)) {
    add<void (*)(cudaStream_t, Args...), Args...>(m, name, launcher);
}

template <typename R, typename... Args> static void def(PyObject* m, const char* name, R (*f)(Args...)) {
    add<R (*)(Args...), Args...>(m, name, f);
}

static PyObject* module(PyModuleDef* definition, void (*bind)(PyObject*)) {
    PyObject* m = PyModule_Create(definition);
    try {
        if (m) bind(m);
        return m;
    } catch (const PythonError&) {
        Py_DECREF(m);
        return nullptr;
    }
}

#define LING_TEXT_OF(name) #name
#define LING_TEXT(name) LING_TEXT_OF(name)
#define LING_INIT_OF(name) PyInit_##name
#define LING_INIT(name) LING_INIT_OF(name)
#define LING_BINDINGS(m)                                                                                              \
    static void bind(PyObject* m);                                                                                    \
    PyMODINIT_FUNC LING_INIT(LING_MODULE)() {                                                                         \
        static PyModuleDef definition{                                                                                \
            PyModuleDef_HEAD_INIT, LING_TEXT(LING_MODULE), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr}; \
        return module(&definition, bind);                                                                             \
    }                                                                                                                 \
    static void bind(PyObject* m)
