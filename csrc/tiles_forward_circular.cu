#include "launch.cuh"

INSTANTIATE_TILES(forward, false)
INSTANTIATE_TILE(forward, 16, false, 16)
