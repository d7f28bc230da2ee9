// What every kernel source needs.
#pragma once

#include "dspark/block.h"

// A kernel of up to kBlockThreads threads, at least `blocks` of which fit a multiprocessor.
#define DSPARK_KERNEL(blocks) extern "C" __global__ void __launch_bounds__(dspark::kBlockThreads, blocks)
