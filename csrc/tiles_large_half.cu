#include "launch.cuh"

INSTANTIATE_TILES(64, true, 1)
