// Which cache rows move when a pass is accepted, and in which order.
//
// Accepted row path[j] of the pass goes to place j. A path rises, so path[j] >= j; moving j = 1, 2, ... in turn never
// writes a row that is still to be read, and columns of a row are independent. So each thread owns columns and needs no
// buffer and no barrier, although source and destination overlap.
#pragma once

#include "dspark/platform.h"

namespace dspark {

constexpr int kMaxCacheTensors = 160;  // pointers of one launch: they fit the 4 KiB of kernel parameters

// One cache tensor [batch, heads, capacity, row], `row` in units of the copy.
struct CacheTensor {
  void* data;
  int32_t heads;
  int32_t row_units;
};

struct CacheTensors {
  CacheTensor items[kMaxCacheTensors];
  int32_t count;
};

// Moves one column. `column` points at its unit in slot 0 of its sequence and head; slots are `stride` units apart. A
// row outside the pass or the capacity ends the moving.
template <class Unit>
DSPARK_HD void compact_column(Unit* column, int64_t stride, int64_t capacity, int64_t start, const int64_t* path,
                              int rows, int64_t accepted) {
  for (int64_t j = 1; j <= accepted && j < rows; ++j) {
    const int64_t from = path[j];
    if (from < j || from >= rows || start < 0 || start + from >= capacity) return;
    if (from != j) column[(start + j) * stride] = column[(start + from) * stride];
  }
}

// 16 bytes at once where rows allow it.
struct alignas(16) Unit16 {
  uint64_t parts[2];
};

}  // namespace dspark
