#include "launch.cuh"

INSTANTIATE_LONG(32, 256)
