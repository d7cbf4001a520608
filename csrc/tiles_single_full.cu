#include "launch.cuh"

INSTANTIATE_TILES(32, false, 1)
