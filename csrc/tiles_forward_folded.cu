#define OWN_REGISTERS
#include "launch.cuh"

INSTANTIATE_TILES(forward, true)
