// What is asked of the CUDA runtime apart from launches.
#include <cuda_runtime.h>

#include "launch.h"

extern "C" const char* fft_conv_error_string(int code) {
    return code == kUnsupported ? "no kernel for these parameters" : cudaGetErrorString(static_cast<cudaError_t>(code));
}

extern "C" int fft_conv_shared_limit(int device) {
    int bytes = 0;
    return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == 0 ? bytes : kUnsupported;
}
