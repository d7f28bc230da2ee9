// All kernels as one source: what a fatbin is made of.
#include "kernels/compact.cu"
#include "kernels/draft.cu"
#include "kernels/verify.cu"
