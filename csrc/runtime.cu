// What is asked of the CUDA runtime apart from launches.
#include "launch.cuh"

extern "C" const char* fft_conv_error_string(int code) {
    return code == kUnsupported ? "no kernel for these parameters" : cudaGetErrorString(static_cast<cudaError_t>(code));
}

// Of a device, or zero and an error; asked once.
template <cudaDeviceAttr kAttribute>
static int attribute(int device, int* error) {
    static std::atomic<int> known[kKnownDevices];
    int value = device < kKnownDevices ? known[device].load(std::memory_order_relaxed) : 0;
    if (value == 0) {
        *error = cudaDeviceGetAttribute(&value, kAttribute, device);
        if (device < kKnownDevices && *error == 0) known[device].store(value, std::memory_order_relaxed);
    }
    return value;
}

extern "C" int fft_conv_shared_limit(int device) {
    int error = 0;
    const int bytes = attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device, &error);
    return error ? kUnsupported : bytes;
}

int processor_count(int device, int* error) { return attribute<cudaDevAttrMultiProcessorCount>(device, error); }
