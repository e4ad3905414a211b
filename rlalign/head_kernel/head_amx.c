/* float32 logits of few rows, straight from a bf16 lm_head in its ordinary [vocabulary][hidden] layout, with AMX tiles.
 *
 * The weight is the left operand of every tile product: 16 of its rows times 32 of their elements are one tile as they lie in
 * memory, so nothing is repacked or copied, and each byte of it is read once. The hidden states are packed in pairs beforehand (a few
 * kilobytes). Products are exact and summed in float32 in the order of the hidden dimension, as in the library products of
 * products.py, whose bits these are. The result comes out turned over and is turned back 16 by 16 in registers.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;
enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, TILE = 16, INNER = 32 };

/* Linux lends the tile registers to a process that asks; 1 when it does. */
int rlalign_allow_tiles(void) { return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0; }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void configure(void) {
  struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {.palette = 1};
  for (int t = 0; t < 8; t++) { tiles.rows[t] = TILE; tiles.bytes[t] = 64; }
  _tile_loadconfig(&tiles);
}

/* hidden [n][d] -> packed [n / 16][d / 2][16][2]; rows past n are zero. packed holds ceil(n / 16) * 16 * d elements. */
void rlalign_pack(const bf16 *hidden, int64_t stride, int64_t n, int64_t d, bf16 *packed) {
  for (int64_t first = 0; first < n; first += TILE)
    for (int64_t pair = 0; pair < d / 2; pair++)
      for (int64_t r = first; r < first + TILE; r++) {
        *packed++ = r < n ? hidden[r * stride + 2 * pair] : 0;
        *packed++ = r < n ? hidden[r * stride + 2 * pair + 1] : 0;
      }
}

static void transpose(const float *tile, __m512 *out) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_load_ps(tile + 16 * i);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) {
      b[i + 8 * j] = _mm512_shuffle_f32x4(a[i + 8 * j], a[i + 8 * j + 4], 0x88);
      b[i + 8 * j + 4] = _mm512_shuffle_f32x4(a[i + 8 * j], a[i + 8 * j + 4], 0xdd);
    }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) {
      out[i + 4 * j] = _mm512_shuffle_f32x4(b[i + 4 * j], b[i + 4 * j + 8], 0x88);
      out[i + 4 * j + 8] = _mm512_shuffle_f32x4(b[i + 4 * j], b[i + 4 * j + 8], 0xdd);
    }
}

/* Tile t, [16 of the vocabulary][16 rows], to out[row][vocabulary]; past the caches where a line is written whole. */
static void put(const float *t, float *out, int64_t stride, int64_t rows, int64_t width) {
  __m512 lines[16];
  transpose(t, lines);
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
static void few(const bf16 *w, int64_t stride, int64_t v, int64_t vocab, int64_t d, const bf16 *h, int64_t n, float *out, int64_t to) {
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
static void many(const bf16 *w, int64_t stride, int64_t v, int64_t vocab, int64_t d, const bf16 *h, int64_t n, float *out, int64_t to) {
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

/* logits[n][start..stop) of n packed rows; d is a multiple of 32, start a multiple of 64. Strides in elements. */
void rlalign_logits(const bf16 *weight, int64_t stride, int64_t start, int64_t stop, int64_t vocab, int64_t d,
                    const bf16 *packed, int64_t n, float *logits, int64_t to) {
  bf16 *edge = aligned_alloc(64, 4 * TILE * d * sizeof(bf16));
  int64_t step = n <= TILE ? 4 * TILE : 2 * TILE;
  configure();
  for (int64_t v = start; v < stop; v += step) {
    int64_t own = stride;
    const bf16 *w = weight_rows(weight, &own, v, step, vocab, d, edge);
    (n <= TILE ? few : many)(w, own, v, vocab, d, packed, n, logits, to);
  }
  _mm_sfence();
  _tile_release();
  free(edge);
}
