// The walk along a tree of drafts, given the target's draw after every row.
#pragma once

#include "dspark/sample.h"

namespace dspark {

constexpr int kMaxRows = 256;  // of the host build; the kernels take kMaxVerifyRows

struct WalkShared {
  int32_t depth[kMaxRows];
  uint64_t found;
};

// One sequence of a verify pass. Rows of `ancestors` show what each row sees: itself and the rows above it.
struct Tree {
  const int64_t* tokens;     // [rows]
  const uint8_t* ancestors;  // [rows, rows], 0 or 1
  int rows;
};

// Where a verdict goes: `path` [rows] accepted rows, then -1; `emitted` [rows] their draws, then -1; `accepted` drafts.
struct Verdict {
  int64_t* path;
  int64_t* emitted;
  int64_t* accepted;
};

// Follows the draws, drawn(row), from the anchor: to the child that holds the token drawn, until there is none. A child
// of a row sees it and is one deeper. Should siblings repeat a token, the first is taken. A damaged row emits kDamaged
// and ends the walk, so that emitted[accepted] is -1 exactly where the logits were damaged.
template <class Block, class Drawn>
DSPARK_HD void walk(const Block& block, WalkShared& shared, const Tree& tree, Drawn drawn, const Verdict& verdict) {
  const int threads = block.size(), rows = tree.rows;
  block.each([&](int thread) {
    for (int row = thread; row < rows; row += threads) {
      int depth = 0;
      for (int i = 0; i < rows; ++i) depth += tree.ancestors[row * rows + i] != 0;
      shared.depth[row] = depth;
      verdict.path[row] = verdict.emitted[row] = -1;
    }
  });
  int row = 0, accepted = 0;
  for (;; ++accepted) {
    const int64_t token = drawn(row);
    block.each([&](int thread) {
      if (thread != 0) return;
      verdict.path[accepted] = row;
      verdict.emitted[accepted] = token;
      shared.found = 0;
    });
    if (token == kDamaged) break;
    block.each([&](int thread) {
      uint64_t best = 0;
      for (int i = row + 1 + thread; i < rows; i += threads) {
        const bool child = tree.ancestors[i * rows + row] != 0 && shared.depth[i] == shared.depth[row] + 1;
        if (child && tree.tokens[i] == token) best = larger(best, static_cast<uint64_t>(kMaxRows - i));
      }
      block.raise_together(&shared.found, best);
    });
    const uint64_t found = block.read(&shared.found);
    if (found == 0) break;
    row = kMaxRows - static_cast<int>(found);
  }
  block.each([&](int thread) {
    if (thread == 0) *verdict.accepted = accepted;
  });
}

}  // namespace dspark
