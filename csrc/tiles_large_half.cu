#include "launch.cuh"

INSTANTIATE_TILES(32, true, 1, 2)
