// The CUDA runtime and driver that nvcc's host objects of csrc/ see on the virtual GPU. A launch goes to Python, which
// has the PTX; device memory is the host's; streams are empty, as every launch has ended when it returns. What the real
// runtime refuses is refused here too.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>

#include "tensor_map.h"

namespace {

constexpr size_t kBlockShared = 227 << 10, kMultiprocessorShared = 228 << 10,
                 kReservedShared = 1 << 10;  // bytes, sm_90
constexpr unsigned kBlockThreads = 1024, kMultiprocessorThreads = 2048, kMultiprocessorBlocks = 32;

// Runs a kernel: its mangled name, sizes, the addresses of its arguments. Returns 0, or 1 after an error. Bytes 1, 2
// and 3 of the attributes are the cluster's dimensions, 0 where the launch names none.
constexpr unsigned kCooperative = 1, kOverlaps = 2;
using Launch = int (*)(const char* name, const unsigned* grid, const unsigned* block, unsigned dynamic, void** args,
                       unsigned attributes);
Launch run_kernel;

struct Function {
    std::string name;
    size_t dynamic = 48 << 10;                    // bytes of dynamic shared memory that a launch may ask for
    int carveout = cudaSharedmemCarveoutDefault;  // percent of an SM's memory that should be shared memory
};
std::unordered_map<const void*, Function>& functions() {  // by the address of the host's stub
    static std::unordered_map<const void*, Function> all;
    return all;
}

int multiprocessors() {
    const char* value = std::getenv("LING_GPU_SMS");
    return value ? std::atoi(value) : 3;
}

size_t resident(unsigned threads, size_t dynamic) {
    return std::min<size_t>({kMultiprocessorBlocks, kMultiprocessorThreads / ((threads + 31) / 32 * 32),
                             kMultiprocessorShared / (dynamic + kReservedShared)});
}

uint32_t element_size(CUtensorMapDataType type) {
    switch (type) {
        case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
        case CU_TENSOR_MAP_DATA_TYPE_UINT16:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
        case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
        case CU_TENSOR_MAP_DATA_TYPE_INT64:
        case CU_TENSOR_MAP_DATA_TYPE_UINT64:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
        default: return 4;
    }
}

// cuTensorMapEncodeTiled, with the limits that the driver's manual names
CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
    const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || rank < 1 ||
        rank > 5 || swizzle > CU_TENSOR_MAP_SWIZZLE_128B || address(base) % 16 || address(out) % 64)
        return CUDA_ERROR_INVALID_VALUE;
    TensorMap map{};
    map.magic = kTensorMap, map.base = static_cast<char*>(base), map.rank = rank, map.element = element_size(type);
    map.swizzle = swizzle;
    for (uint32_t d = 0; d < rank; d++) {
        if (!sizes[d] || sizes[d] > 1ull << 32 || !box[d] || box[d] > 256 || steps[d] != 1)
            return CUDA_ERROR_INVALID_VALUE;
        map.sizes[d] = sizes[d], map.box[d] = box[d];
        if (d == 0) continue;
        if (strides[d - 1] % 16 || strides[d - 1] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
        map.strides[d - 1] = strides[d - 1];
    }
    const uint32_t line = box[0] * map.element, widest[] = {~0u, 32, 64, 128};  // bytes, by swizzle
    if (line % 16 || line > widest[swizzle]) return CUDA_ERROR_INVALID_VALUE;
    std::memset(out, 0, sizeof *out), std::memcpy(out, &map, sizeof map);
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void gpu_on_launch(Launch f) { run_kernel = f; }

// What nvcc's objects call when they are loaded
void** __cudaRegisterFatBinary(void*) { return new void*; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) { delete handle; }
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    functions()[stub].name = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }  // kernel<<<...>>>: csrc/ has none
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** args) {
    const Function& f = functions()[stub];
    const unsigned grid[] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
    const unsigned block[] = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
    const size_t blocks = size_t{grid[0]} * grid[1] * grid[2], threads = size_t{block[0]} * block[1] * block[2];
    if (!blocks || !threads || threads > kBlockThreads || grid[1] > 65535 || grid[2] > 65535 || block[2] > 64 ||
        config->dynamicSmemBytes > f.dynamic)
        return cudaErrorInvalidConfiguration;
    unsigned attributes = 0;
    for (unsigned i = 0; i < config->numAttrs; i++) {
        const cudaLaunchAttribute& a = config->attrs[i];
        if (a.id == cudaLaunchAttributeCooperative) attributes |= a.val.cooperative ? kCooperative : 0;
        else if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization)
            attributes |= a.val.programmaticStreamSerializationAllowed ? kOverlaps : 0;
        else if (a.id == cudaLaunchAttributeClusterDimension)
            attributes |= a.val.clusterDim.x << 8 | a.val.clusterDim.y << 16 | a.val.clusterDim.z << 24;
        else return cudaErrorNotSupported;
    }
    // Kernels that overlap must ask for one split of an SM's memory: it changes only when the SM is empty.
    if (attributes & kOverlaps && f.carveout != cudaSharedmemCarveoutMaxShared) return cudaErrorInvalidConfiguration;
    if (attributes & kCooperative && blocks > resident(threads, config->dynamicSmemBytes) * multiprocessors())
        return cudaErrorCooperativeLaunchTooLarge;
    if (!run_kernel) return cudaErrorNotReady;
    return run_kernel(f.name.c_str(), grid, block, config->dynamicSmemBytes, args, attributes) ? cudaErrorLaunchFailure
                                                                                               : cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute what, int value) {
    if (what == cudaFuncAttributeNonPortableClusterSizeAllowed) return cudaSuccess;
    if (what == cudaFuncAttributePreferredSharedMemoryCarveout) {
        if (value < -1 || value > 100) return cudaErrorInvalidValue;
        functions()[stub].carveout = value;
        return cudaSuccess;
    }
    if (what != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorNotSupported;
    if (value < 0 || static_cast<size_t>(value) > kBlockShared) return cudaErrorInvalidValue;
    functions()[stub].dynamic = value;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t dynamic) {
    *blocks = resident(threads, dynamic);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
    if (what != cudaDevAttrMultiProcessorCount) return cudaErrorNotSupported;
    *value = multiprocessors();
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
// As in a CUDA graph: launches overlap wherever csrc/ lets them, and each has counters of its own.
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = std::getenv("LING_GPU_EAGER") ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaErrorLaunchFailure: return "the kernel failed";
        case cudaErrorInvalidConfiguration: return "a grid, block or shared memory that a Hopper GPU does not launch";
        case cudaErrorCooperativeLaunchTooLarge: return "a cooperative launch of more blocks than run at once";
        default: return "the virtual GPU does not have this function of the CUDA runtime";
    }
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    const bool known = !std::strcmp(name, "cuTensorMapEncodeTiled");
    *f = known ? reinterpret_cast<void*>(encode_tiled) : nullptr;
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
}
