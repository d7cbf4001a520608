#include "launch.cuh"

INSTANTIATE_TILE(forward, 32, true, 1, true)
