#include "launch.cuh"

INSTANTIATE_CLUSTER(8, true)
INSTANTIATE_CLUSTER(16, true)
