#include "launch.cuh"

INSTANTIATE_TILES(16, false, 16)
