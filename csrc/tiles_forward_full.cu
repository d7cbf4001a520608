#include "launch.cuh"

INSTANTIATE_TILES(forward, 32, false, 1)
INSTANTIATE_TILES(forward, 32, false, 2)
INSTANTIATE_TILES(forward, 32, false, 4)
INSTANTIATE_TILES(forward, 32, false, 8)
INSTANTIATE_TILES(forward, 32, false, 16)
INSTANTIATE_TILES(forward, 16, false, 16)
