/* float32 logits of few rows, straight from a bf16 lm_head in its ordinary [vocabulary][hidden] layout, with AMX tiles.
 *
 * The weight is the left operand of every tile product: 16 of its rows times 32 of their elements are one tile as they lie in
 * memory, so nothing is repacked or copied, and each byte of it is read once. The hidden states are packed in pairs beforehand (a few
 * kilobytes). Products are exact and summed in float32 in the order of the hidden dimension, as in the library products of
 * products.py, whose bits these are. The result comes out turned over and is turned back 16 by 16 in registers.
 */
#include "head.h"
#if !defined RLALIGN_NO_AMX && !defined RLALIGN_NO_AVX512
#include <stdlib.h>

#define PATH amx
#define NAME(f) f##_amx
#define TARGET __attribute__((target("avx512f,amx-tile,amx-bf16")))
#include "transpose512.h"

enum { TILE = 16, INNER = 32 };

TARGET static void configure(void) {
  struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {.palette = 1};
  for (int t = 0; t < 8; t++) { tiles.rows[t] = TILE; tiles.bytes[t] = 64; }
  _tile_loadconfig(&tiles);
}

int64_t panels_amx(int64_t n) { return (n + TILE - 1) / TILE; }

/* hidden [n][d] -> panels [d / 2][16][2]; rows past n are zero. packed holds ceil(n / 16) * 16 * d elements. */
void pack_amx(const void *hidden, int64_t stride, int wide, int64_t n, int64_t d, int64_t first, int64_t last, void *packed) {
  const bf16 *h = hidden;
  bf16 *to = (bf16 *)packed + first * TILE * d;
  for (int64_t row = first * TILE; row < last * TILE; row += TILE)
    for (int64_t pair = 0; pair < d / 2; pair++)
      for (int64_t r = row; r < row + TILE; r++) {
        *to++ = r < n ? h[r * stride + 2 * pair] : 0;
        *to++ = r < n ? h[r * stride + 2 * pair + 1] : 0;
      }
}

/* Tile t, [16 of the vocabulary][16 rows], to out[row][vocabulary]; past the caches where a line is written whole. */
TARGET static void put(const float *t, float *out, int64_t stride, int64_t rows, int64_t width) {
  __m512 lines[TILE];
  for (int i = 0; i < TILE; i++) lines[i] = _mm512_load_ps(t + TILE * i);
  transpose_amx(lines);
  int whole = width == TILE && ((uintptr_t)out & 63) == 0 && (stride & 15) == 0;
  __mmask16 mask = (__mmask16)((1u << width) - 1);
  for (int64_t r = 0; r < rows; r++)
    if (whole) _mm512_stream_ps(out + r * stride, lines[r]);
    else _mm512_mask_storeu_ps(out + r * stride, mask, lines[r]);
}

/* `count` rows of the weight from v on, zeros past its end: the weight itself, or a copy in `edge` for the last ones. */
static const bf16 *weight_rows(const bf16 *weight, int64_t *stride, int64_t v, int64_t count, int64_t vocab, int64_t d, bf16 *edge) {
  if (v + count <= vocab) return weight + v * *stride;
  memset(edge, 0, count * d * sizeof(bf16));
  for (int64_t i = v; i < vocab; i++) memcpy(edge + (i - v) * d, weight + i * *stride, d * sizeof(bf16));
  *stride = d;
  return edge;
}

/* Up to 16 rows: four tiles of the vocabulary at a time. The hardware fetches ahead; asking it to was 10 % slower. */
TARGET static void few(const bf16 *w, int64_t stride, int64_t v, int64_t vocab, int64_t d, const bf16 *h, int64_t n, float *out, int64_t to) {
  __attribute__((aligned(64))) float t[4][TILE * TILE];
  int64_t bytes = stride * 2, down = TILE * stride;
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int64_t k = 0; k < d; k += INNER) {
    _tile_loadd(4, h + k * TILE, 64);
    _tile_loadd(5, w + k, bytes);            _tile_dpbf16ps(0, 5, 4);
    _tile_loadd(6, w + k + down, bytes);     _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(7, w + k + 2 * down, bytes); _tile_dpbf16ps(2, 7, 4);
    _tile_loadd(5, w + k + 3 * down, bytes); _tile_dpbf16ps(3, 5, 4);
  }
  _tile_stored(0, t[0], 64); _tile_stored(1, t[1], 64); _tile_stored(2, t[2], 64); _tile_stored(3, t[3], 64);
  for (int i = 0; i < 4; i++, v += TILE)
    if (v < vocab) put(t[i], out + v, to, n, least(TILE, vocab - v));
}

/* More rows: 32 of the vocabulary, which stay in the cache, against 32 rows at a time. */
TARGET static void many(const bf16 *w, int64_t stride, int64_t v, int64_t vocab, int64_t d, const bf16 *h, int64_t n, float *out, int64_t to) {
  __attribute__((aligned(64))) float t[4][TILE * TILE];
  int64_t bytes = stride * 2, down = TILE * stride;
  for (int64_t row = 0; row < n; row += 2 * TILE) {
    const bf16 *h0 = h + row * d, *h1 = row + TILE < n ? h0 + TILE * d : h0;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t k = 0; k < d; k += INNER) {
      _tile_loadd(4, w + k, bytes);        _tile_loadd(6, h0 + k * TILE, 64); _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, w + k + down, bytes); _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(7, h1 + k * TILE, 64);   _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, t[0], 64); _tile_stored(1, t[1], 64); _tile_stored(2, t[2], 64); _tile_stored(3, t[3], 64);
    for (int i = 0; i < 4; i++) {
      int64_t at = v + TILE * (i & 1), r = row + TILE * (i >> 1);
      if (at < vocab && r < n) put(t[i], out + r * to + at, to, least(TILE, n - r), least(TILE, vocab - at));
    }
  }
}

/* logits[n][start..stop) of n packed rows; d is a multiple of 32. */
TARGET void logits_amx(const void *weight, int64_t stride, int wide, int64_t start, int64_t stop, int64_t d, const void *packed,
                       int64_t n, float *logits, int64_t to) {
  bf16 *edge = aligned_alloc(64, 4 * TILE * d * sizeof(bf16));
  int64_t step = n <= TILE ? 4 * TILE : 2 * TILE;
  configure();
  for (int64_t v = start; v < stop; v += step) {
    int64_t own = stride;
    const bf16 *w = weight_rows(weight, &own, v, step, stop, d, edge);
    (n <= TILE ? few : many)(w, own, v, stop, d, packed, n, logits, to);
  }
  _mm_sfence();
  _tile_release();
  free(edge);
}
#endif
