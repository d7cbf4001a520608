// What is asked of the CUDA runtime apart from launches.
#include "launch.cuh"

extern "C" const char* fft_conv_error_string(int code) {
    return code == kUnsupported ? "no kernel for these parameters" : cudaGetErrorString(static_cast<cudaError_t>(code));
}

extern "C" int fft_conv_shared_limit(int device) {
    int bytes = 0;
    return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == 0 ? bytes : kUnsupported;
}

int processor_count(int device, int* error) {
    static std::atomic<int> known[kKnownDevices];
    int processors = device < kKnownDevices ? known[device].load(std::memory_order_relaxed) : 0;
    if (processors == 0) {
        *error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        if (device < kKnownDevices && *error == 0) known[device].store(processors, std::memory_order_relaxed);
    }
    return processors;
}
