#include "launch.cuh"

INSTANTIATE_TILES(64, false, 1)
