#include "launch.cuh"

INSTANTIATE_CLUSTER(8)
INSTANTIATE_CLUSTER(16)
template struct ClusterLauncher<float, 2>;
template struct ClusterLauncher<float, 4>;
