#include "launch.cuh"

INSTANTIATE_TILES(forward, 32, true, 1, true)
