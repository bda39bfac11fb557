// Counters in global memory. Every file that includes this has counters of its own.
#pragma once
#include "common.cuh"

namespace ling {
namespace {

// Some for each stream, and some for each captured launch, since kernels of different streams or graphs may run at the
// same time; captured launches share them only once all are taken. A counter is 0 at first, and a kernel must leave it
// as the next one expects it.
constexpr int kStreams = 1024, kPerLaunch = 512, kCaptured = 1 << 18;
__device__ unsigned counters[kStreams * kPerLaunch + kCaptured];

// The index of the first of `count` counters for a launch in this stream
int counter_of(cudaStream_t stream, int count = 1) {
    static std::mutex mutex;
    static std::map<cudaStream_t, int> indices;
    static int captured = 0;
    LING_CHECK(count <= kPerLaunch);
    const std::lock_guard lock(mutex);
    if (is_captured(stream)) {
        if (captured + count > kCaptured) captured = 0;
        return kStreams * kPerLaunch + std::exchange(captured, captured + count);
    }
    const int index = indices.try_emplace(stream, static_cast<int>(indices.size())).first->second;
    if (index >= kStreams) throw std::runtime_error("a kernel has been launched on more than 1024 streams");
    return index * kPerLaunch;
}

}  // namespace
}  // namespace ling
