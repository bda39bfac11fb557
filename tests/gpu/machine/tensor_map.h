// A tensor map of the virtual GPU: what its cuTensorMapEncodeTiled writes in place of a CUtensorMap's 128 bytes.
#pragma once
#include <cstdint>

constexpr uint64_t kTensorMap = 0x7031746d61707478;
struct TensorMap {
    uint64_t magic;  // kTensorMap
    char* base;
    uint32_t rank, element, swizzle, nan;  // element: bytes; swizzle: lines of 16, 32, 64 or 128 bytes
    uint32_t sizes[5], box[5];             // elements, innermost dimension first
    uint64_t strides[4];                   // bytes, of dimensions 1 and up
};
static_assert(sizeof(TensorMap) <= 128);
