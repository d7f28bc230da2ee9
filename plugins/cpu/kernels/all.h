// Included by each instruction set, inside its unnamed namespace: the same kernels over its own registers.
// No include guard: one inclusion per set file.
#include "wide.h"
#include "math.h"
#include "quantize.h"
#include "stream_product.h"
#include "block_product.h"
#include "lookup.h"
#include "attention.h"
#include "rows.h"
#include "draft.h"

#define DSPARK_SET(name) \
  {name, quantize_blocks, quantize_row, product, lookup, turn, attend, merge, finish, mask_bits, rms_norm, layer_norm, gate, unary, \
   likely, spread, top}
