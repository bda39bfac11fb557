// Counters in global memory. Every file that includes this has counters of its own.
#pragma once
#include "common.cuh"

namespace ling {
namespace {

// One per stream, and one per captured launch, since kernels of different streams or graphs may run at the same time. A
// counter is 0 at first, and a kernel must leave it as the next one expects it.
constexpr int kStreams = 1024, kCaptured = 1 << 16;
__device__ unsigned counters[kStreams + kCaptured];

// The index of the counter for a launch in this stream
int counter_of(cudaStream_t stream) {
    static std::mutex mutex;
    static std::map<cudaStream_t, int> indices;
    static int captured = 0;
    const std::lock_guard lock(mutex);
    if (is_captured(stream)) return kStreams + captured++ % kCaptured;
    const int index = indices.try_emplace(stream, static_cast<int>(indices.size())).first->second;
    if (index >= kStreams) throw std::runtime_error("a kernel has been launched on more than 1024 streams");
    return index;
}

}  // namespace
}  // namespace ling
