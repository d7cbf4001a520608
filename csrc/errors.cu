#include <cuda_runtime.h>

#include "launch.h"

extern "C" const char* fft_conv_error_string(int code) {
    return code == kUnsupported ? "no kernel for these parameters" : cudaGetErrorString(static_cast<cudaError_t>(code));
}
