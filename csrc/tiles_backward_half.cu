#include "launch.cuh"

INSTANTIATE_TILES(backward, 32, true, 1)
INSTANTIATE_TILES(backward, 32, true, 2)
INSTANTIATE_TILES(backward, 32, true, 4)
INSTANTIATE_TILES(backward, 32, true, 8)
INSTANTIATE_TILES(backward, 32, true, 16)
