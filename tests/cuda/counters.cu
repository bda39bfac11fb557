// Accesses of one warp whose sectors, wavefronts and instructions follow from the definition: see test_gpu_counters.py.
extern __shared__ float words[];

// Lane i reads the 4, 8 or 16 bytes number at[i] of shared memory.
template <typename T> __device__ void read_shared(T* out, const int* at) {
    out[threadIdx.x] = reinterpret_cast<const T*>(words)[at[threadIdx.x]];
}
extern "C" __global__ void shared_4(float* out, const int* at) { read_shared(out, at); }
extern "C" __global__ void shared_8(float2* out, const int* at) { read_shared(out, at); }
extern "C" __global__ void shared_16(float4* out, const int* at) { read_shared(out, at); }

// Four words side by side: ptxas makes one access of them.
extern "C" __global__ void shared_merged(float* out, const int* at) {
    const float* p = words + 4 * at[threadIdx.x];
    out[threadIdx.x] = p[0] + p[1] + p[2] + p[3];
}

// Lane i reads the 4 or 16 bytes number at[i] of `in`.
extern "C" __global__ void global_4(float* out, const int* at, const float* in) {
    out[threadIdx.x] = in[at[threadIdx.x]];
}
extern "C" __global__ void global_16(float4* out, const int* at, const float4* in) {
    out[threadIdx.x] = in[at[threadIdx.x]];
}

// Lanes below `active` take part in n steps.
extern "C" __global__ void few_lanes(float* out, int active, int n) {
    if (threadIdx.x >= active) return;
    float sum = out[threadIdx.x];
#pragma unroll 1
    for (int i = 0; i < n; i++) sum = sum * sum + 1;
    out[threadIdx.x] = sum;
}
