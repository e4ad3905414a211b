/* float32 logits = hidden . weight^T with AVX2 or AVX-512, whose bits no number of rows, columns, threads or lanes can change.
 *
 * The law: the inner dimension is cut into blocks of BLOCK; inside one, acc = fma(h[k], w[k], acc) from acc = 0 over ascending k; the
 * blocks are added in ascending order, logit = (acc_0 + acc_1) + ... Every product and sum is an IEEE operation of one lane, so the two
 * instruction sets agree, and so does any order in which rows and columns are visited. The weight, bf16 or float32, is read as it
 * lies ([vocabulary][inner], any row stride) and turned over in registers; each byte of it leaves memory once.
 */
#include "head.h"

/* Rows go in panels of nearly equal height, at most `most`: panel i of `count` starts at row first_row(n, count, i). */
static int64_t panels(int64_t n, int64_t most) { return (n + most - 1) / most; }
static int64_t first_row(int64_t n, int64_t count, int64_t i) { return n * i / count; }

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(f) PASTE(f, PATH)

#define PATH avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define MOST 6 /* rows of a panel: 12 sums, 2 vectors of the weight and 1 of the hidden states fill the 16 registers */
typedef __m256 vec_avx2;
#define OP(f) _mm256_##f
#define WORD __m256i
#define LOW(x) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16))
#define HIGH(x) _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32((int)0xffff0000)))

TARGET static inline void transpose_avx2(__m256 *r) {
  __m256 a[8];
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      __m256 even = j ? _mm256_unpackhi_ps(r[i], r[i + 1]) : _mm256_unpacklo_ps(r[i], r[i + 1]);
      __m256 odd = j ? _mm256_unpackhi_ps(r[i + 2], r[i + 3]) : _mm256_unpacklo_ps(r[i + 2], r[i + 3]);
      a[i + 2 * j] = _mm256_shuffle_ps(even, odd, 0x44);
      a[i + 2 * j + 1] = _mm256_shuffle_ps(even, odd, 0xee);
    }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
  }
}
#include "fma.h"

#ifndef RLALIGN_NO_AVX512
#undef PATH
#undef TARGET
#undef LANES
#undef MOST
#undef OP
#undef LOW
#undef HIGH
#define PATH avx512
#define TARGET __attribute__((target("avx512f")))
#define LANES 16
#define MOST 14
typedef __m512 vec_avx512;
#define OP(f) _mm512_##f
#define LOW(x) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16))
#define HIGH(x) _mm512_castsi512_ps(_mm512_and_epi32(_mm512_castps_si512(x), _mm512_set1_epi32((int)0xffff0000)))
#include "transpose512.h"
#include "fma.h"
#endif
