// Kernels of CompactCache; their launch contract is in dspark/kernels.h.
#include "dspark/compact.h"

#include "dspark/kernels.h"
#include "types.h"

namespace dspark {

// A thread moves one column of one sequence of one tensor.
template <class Unit>
__device__ void compact_cache(const CacheTensor& tensor, const int64_t* path, const int64_t* accepted,
                              const int64_t* starts, int rows, int64_t capacity) {
  const int64_t sequence = blockIdx.y, units = tensor.row_units;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= tensor.heads * units) return;
  const int64_t head = column / units, unit = column % units;
  Unit* const first = static_cast<Unit*>(tensor.data) + (sequence * tensor.heads + head) * capacity * units + unit;
  compact_column(first, units, capacity, starts[sequence], path + sequence * rows, rows, accepted[sequence]);
}

}  // namespace dspark

#define DSPARK_COMPACT_KERNELS(suffix, Unit)                                                                           \
  DSPARK_KERNEL(1)                                                                                                     \
  dspark_compact_cache_##suffix(const __grid_constant__ dspark::CacheTensors tensors, const int64_t* path,             \
                               const int64_t* accepted, const int64_t* starts, int32_t rows, int32_t capacity) {       \
    dspark::compact_cache<Unit>(tensors.items[blockIdx.z], path, accepted, starts, rows, capacity);                    \
  }                                                                                                                    \
  DSPARK_KERNEL(1)                                                                                                     \
  dspark_compact_cache_table_##suffix(const dspark::CacheTensors* tensors, const int64_t* path,                        \
                                     const int64_t* accepted, const int64_t* starts, int32_t rows,                     \
                                     int32_t capacity) {                                                               \
    dspark::compact_cache<Unit>(tensors->items[blockIdx.z], path, accepted, starts, rows, capacity);                   \
  }

DSPARK_COMPACT_KERNELS(16, dspark::Unit16)
DSPARK_COMPACT_KERNELS(1, uint8_t)
