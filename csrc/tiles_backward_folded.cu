#include "launch.cuh"

INSTANTIATE_TILES(backward, true)
