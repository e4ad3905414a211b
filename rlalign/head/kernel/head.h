/* What the paths of the head kernel share. Strides in elements; `wide`: operands are float32, else bf16. */
#ifndef RLALIGN_HEAD_H
#define RLALIGN_HEAD_H
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
enum { BLOCK = 256 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#define DECLARE(path) \
  int64_t panels_##path(int64_t n); \
  void pack_##path(const void *hidden, int64_t stride, int wide, int64_t n, int64_t d, int64_t first, int64_t last, void *packed); \
  void logits_##path(const void *weight, int64_t stride, int wide, int64_t start, int64_t stop, int64_t d, const void *packed, \
                     int64_t n, float *out, int64_t to);
DECLARE(avx2)
DECLARE(avx512)
DECLARE(amx)
#endif
