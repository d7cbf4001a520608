#include "launch.cuh"

INSTANTIATE_LONG(8)
