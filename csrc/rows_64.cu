#include "launch.cuh"

INSTANTIATE_TILES(64)
