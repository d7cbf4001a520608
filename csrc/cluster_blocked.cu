#include "launch.cuh"

INSTANTIATE_CLUSTER(16, true)
