#define OWN_REGISTERS
#include "launch.cuh"

template struct ClusterLauncher<bfloat16, 2>;
template struct ClusterLauncher<bfloat16, 4>;
template struct ClusterLauncher<float16, 2>;
template struct ClusterLauncher<float16, 4>;
