#include "launch.cuh"

INSTANTIATE_TILES(16)
