#include "launch.cuh"

INSTANTIATE_TILES(backward, false)
INSTANTIATE_TILE(backward, 16, false, 16)
