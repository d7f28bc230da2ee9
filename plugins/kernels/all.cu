// All kernels as one source: what a fatbin is made of.
#include "compact.cu"
#include "draft.cu"
#include "verify.cu"
#include "walk.cu"
