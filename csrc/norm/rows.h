// The alignment that kernels over whole rows need.
#pragma once
#include "tensor.h"

namespace ling {

inline bool rows_aligned(const Tensor& t) {  // every row at a multiple of 16 bytes
    const int64_t vector = t.dtype == DType::f32 ? 4 : 8;
    return t.aligned() && t.stride[1] == 1 && (t.shape[0] <= 1 || t.stride[0] % vector == 0);
}

}  // namespace ling
