// Which cache rows move when a pass is accepted, and in which order.
//
// Accepted row path[j] of the pass goes to place j. A path rises, so path[j] >= j: moving j = 1, 2, ... in turn never
// writes a row that is still to be read. Columns of a row are independent, so each thread owns one and needs no barrier,
// although source and destination overlap.
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

constexpr int kMoves = 4;  // rows on their way together, to overlap the waiting for memory

// Moves one column. `column` points at its unit in slot 0 of its sequence and head; slots are `stride` units apart. A
// row outside the pass or the capacity, or not above the one before it, ends the moving.
template <class Unit>
DSPARK_HD void compact_column(Unit* column, int64_t stride, int64_t capacity, int64_t start, const int64_t* path,
                              int rows, int64_t accepted) {
  const int64_t last = smaller<int64_t>(accepted, rows - 1);
  if (start < 0) return;
  int64_t above = 0;
  for (int64_t first = 1; first <= last; first += kMoves) {
    // Reading early is safe: a row is never written before it is read, only rows below it are.
    Unit units[kMoves];
    int count = 0;
    DSPARK_UNROLL
    for (int i = 0; i < kMoves; ++i) {
      if (count < i || first + i > last) continue;
      const int64_t from = path[first + i];
      if (from <= above || from >= rows || start + from >= capacity) continue;
      above = from;
      units[i] = column[(start + from) * stride];
      count = i + 1;
    }
    DSPARK_UNROLL
    for (int i = 0; i < kMoves; ++i)
      if (i < count) column[(start + first + i) * stride] = units[i];
    if (count < kMoves) return;
  }
}

// 16 bytes at once where rows allow it.
struct alignas(16) Unit16 {
  uint64_t parts[2];
};

}  // namespace dspark
