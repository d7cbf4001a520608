#include "launch.cuh"

INSTANTIATE_TILES(backward, 32, false, 1)
INSTANTIATE_TILES(backward, 32, false, 2)
INSTANTIATE_TILES(backward, 32, false, 4)
INSTANTIATE_TILES(backward, 32, false, 8)
INSTANTIATE_TILES(backward, 32, false, 16)
INSTANTIATE_TILES(backward, 16, false, 16)
