#include "launch.cuh"

INSTANTIATE_BLOCKED(32, true, 1, true)
