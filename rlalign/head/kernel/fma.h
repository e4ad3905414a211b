/* The law of fma.c for one width of registers: PATH, TARGET, LANES, MOST, OP, LOW, HIGH and transpose are that width's. */
#define vec NAME(vec)
#define INLINE TARGET static inline __attribute__((always_inline))
enum { NAME(COLUMNS) = 2 * LANES, NAME(FEW) = 4, NAME(STRIP) = 4 };
#define COLUMNS NAME(COLUMNS)
#define FEW NAME(FEW)     /* up to so many rows skip the buffer: memory is the limit there */
#define STRIP NAME(STRIP) /* vectors of the vocabulary in flight there, to hide the latency of the chain */
#define ROWS 240          /* of hidden states that stay in the second cache while the weight goes by */
#define PANELS 8          /* of the vocabulary that meet them before the next block of k */

int64_t NAME(panels)(int64_t n) { return panels(n, MOST); }

/* hidden [n][d] -> float32 panels [d][height]; panels first to last. */
TARGET void NAME(pack)(const void *hidden, int64_t stride, int wide, int64_t n, int64_t d, int64_t first, int64_t last, void *packed) {
  for (int64_t p = first, count = panels(n, MOST); p < last; p++) {
    int64_t row = first_row(n, count, p), height = first_row(n, count, p + 1) - row;
    float *to = (float *)packed + row * d;
    for (int64_t r = 0; r < height; r++) {
      const float *f = (const float *)hidden + (row + r) * stride;
      const bf16 *b = (const bf16 *)hidden + (row + r) * stride;
      for (int64_t k = 0; k < d; k++) {
        union { uint32_t word; float value; } x = {.word = wide ? 0 : (uint32_t)b[k] << 16};
        to[k * height + r] = wide ? f[k] : x.value;
      }
    }
  }
}

/* LANES words from each of LANES rows at k, turned over: words[i] holds word i of every row. Past d the words are zero. */
INLINE void NAME(words)(const char *const *row, int wide, int64_t k, int64_t d, vec *words) {
  int64_t size = wide ? 4 : 2, bytes = (d - k) * size;
  if (bytes >= 4 * LANES) {
    for (int i = 0; i < LANES; i++) words[i] = OP(loadu_ps)((const float *)(row[i] + k * size));
  } else {
    float edge[LANES] = {0};
    for (int i = 0; i < LANES; i++) {
      memcpy(edge, row[i] + k * size, bytes);
      words[i] = OP(loadu_ps)(edge);
    }
  }
  NAME(transpose)(words);
}

/* Where rows v to v + LANES of the weight begin; past the end the last one again, whose results nobody keeps. */
INLINE void NAME(rows)(const char *weight, int64_t stride, int wide, int64_t v, int64_t stop, const char **row) {
  for (int i = 0; i < LANES; i++) row[i] = weight + least(v + i, stop - 1) * stride * (wide ? 4 : 2);
}

/* COLUMNS rows of the weight, elements k to k + length, to float32 [length][COLUMNS]; `panel` has room for 2 * LANES more lines. */
INLINE void NAME(lift)(const char *weight, int64_t stride, int wide, int64_t v, int64_t stop, int64_t k, int64_t length, float *panel) {
  const char *row[LANES];
  vec words[LANES];
  for (int g = 0; g < COLUMNS; g += LANES) {
    NAME(rows)(weight, stride, wide, v + g, stop, row);
    for (int64_t at = 0; at < length; at += wide ? LANES : 2 * LANES) {
      NAME(words)(row, wide, k + at, k + length, words);
      float *to = panel + at * COLUMNS + g;
      for (int i = 0; i < LANES; i++)
        if (wide) OP(store_ps)(to + i * COLUMNS, words[i]);
        else {
          OP(store_ps)(to + 2 * i * COLUMNS, LOW(words[i]));
          OP(store_ps)(to + (2 * i + 1) * COLUMNS, HIGH(words[i]));
        }
    }
  }
}

/* One block of k for a panel of `height` rows (a constant) and COLUMNS columns; added to `out` but for the first block. */
INLINE void NAME(block)(const int height, const float *h, const float *w, int64_t length, float *out, int64_t to, int add) {
  vec sum[MOST][2];
#pragma GCC unroll 16
  for (int i = 0; i < height; i++) sum[i][0] = sum[i][1] = OP(setzero_ps)();
#pragma GCC unroll 2
  for (int64_t k = 0; k < length; k++, h += height, w += COLUMNS) {
    vec w0 = OP(load_ps)(w), w1 = OP(load_ps)(w + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
      vec x = OP(set1_ps)(h[i]);
      sum[i][0] = OP(fmadd_ps)(x, w0, sum[i][0]);
      sum[i][1] = OP(fmadd_ps)(x, w1, sum[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < height; i++, out += to) {
    OP(storeu_ps)(out, add ? OP(add_ps)(OP(loadu_ps)(out), sum[i][0]) : sum[i][0]);
    OP(storeu_ps)(out + LANES, add ? OP(add_ps)(OP(loadu_ps)(out + LANES), sum[i][1]) : sum[i][1]);
  }
}

TARGET static void NAME(panel)(int height, const float *h, const float *w, int64_t length, float *out, int64_t to, int add) {
  switch (height) {
#define HEIGHT(x) case x: NAME(block)(x, h, w, length, out, to, add); break;
    HEIGHT(1) HEIGHT(2) HEIGHT(3) HEIGHT(4) HEIGHT(5) HEIGHT(6)
#if MOST > 6
    HEIGHT(7) HEIGHT(8) HEIGHT(9) HEIGHT(10) HEIGHT(11) HEIGHT(12) HEIGHT(13) HEIGHT(14)
#endif
#undef HEIGHT
  }
}

/* As `panel` where fewer than COLUMNS columns are left: beside `out`, then copied. */
TARGET static void NAME(edge)(int height, const float *h, const float *w, int64_t length, float *out, int64_t to, int add, int64_t width) {
  float own[MOST * COLUMNS];
  for (int i = 0; add && i < height; i++) memcpy(own + i * COLUMNS, out + i * to, width * sizeof(float));
  NAME(panel)(height, h, w, length, own, COLUMNS, add);
  for (int i = 0; i < height; i++) memcpy(out + i * to, own + i * COLUMNS, width * sizeof(float));
}

INLINE void NAME(many)(const char *weight, int64_t stride, int wide, int64_t start, int64_t stop, int64_t d, const float *packed,
                       int64_t n, float *out, int64_t to) {
  __attribute__((aligned(64))) float lifted[(BLOCK + 2 * LANES) * COLUMNS];
  int64_t count = panels(n, MOST), group = ROWS / MOST, strip = PANELS * COLUMNS;
  for (int64_t p = 0; p < count; p += group)
    for (int64_t s = start; s < stop; s += strip)
      for (int64_t k = 0; k < d; k += BLOCK)
        for (int64_t v = s, length = least(BLOCK, d - k); v < least(s + strip, stop); v += COLUMNS) {
          int64_t width = least(COLUMNS, stop - v);
          NAME(lift)(weight, stride, wide, v, stop, k, length, lifted);
          for (int64_t q = p; q < least(p + group, count); q++) {
            int64_t row = first_row(n, count, q);
            int height = (int)(first_row(n, count, q + 1) - row);
            const float *h = packed + row * d + k * height;
            float *c = out + row * to + v;
            if (width == COLUMNS) NAME(panel)(height, h, lifted, length, c, to, k > 0);
            else NAME(edge)(height, h, lifted, length, c, to, k > 0, width);
          }
        }
}

/* `count` elements of k for one vector of the vocabulary, straight from the weight. */
INLINE void NAME(step)(const int n, const char *const *row, int wide, int64_t k, int64_t d, const float *h, vec *sum) {
  vec words[LANES];
  int64_t count = least(wide ? LANES : 2 * LANES, d - k);
  NAME(words)(row, wide, k, d, words);
  h += k * n;
  if (count == (wide ? LANES : 2 * LANES)) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      vec low = wide ? words[i] : LOW(words[i]);
#pragma GCC unroll 4
      for (int r = 0; r < n; r++) sum[r] = OP(fmadd_ps)(OP(set1_ps)(h[(wide ? i : 2 * i) * n + r]), low, sum[r]);
      if (wide) continue;
      vec high = HIGH(words[i]);
#pragma GCC unroll 4
      for (int r = 0; r < n; r++) sum[r] = OP(fmadd_ps)(OP(set1_ps)(h[(2 * i + 1) * n + r]), high, sum[r]);
    }
  } else {
    for (int i = 0; i < count; i++) {
      vec w = wide ? words[i] : i % 2 ? HIGH(words[i / 2]) : LOW(words[i / 2]);
      for (int r = 0; r < n; r++) sum[r] = OP(fmadd_ps)(OP(set1_ps)(h[i * n + r]), w, sum[r]);
    }
  }
}

INLINE void NAME(few)(const char *weight, int64_t stride, int wide, int64_t start, int64_t stop, int64_t d, const float *packed,
                      const int n, float *out, int64_t to) {
  for (int64_t v = start; v < stop; v += STRIP * LANES) {
    const char *row[STRIP][LANES];
    vec total[STRIP][FEW], sum[STRIP][FEW];
    for (int g = 0; g < STRIP; g++) NAME(rows)(weight, stride, wide, v + g * LANES, stop, row[g]);
    for (int64_t k = 0; k < d; k += BLOCK) {
      int64_t end = least(k + BLOCK, d);
      for (int g = 0; g < STRIP; g++)
        for (int r = 0; r < n; r++) sum[g][r] = OP(setzero_ps)();
      for (int64_t at = k; at < end; at += wide ? LANES : 2 * LANES)
        for (int g = 0; g < STRIP; g++) NAME(step)(n, row[g], wide, at, d, packed, sum[g]);
      for (int g = 0; g < STRIP; g++)
        for (int r = 0; r < n; r++) total[g][r] = k ? OP(add_ps)(total[g][r], sum[g][r]) : sum[g][r];
    }
    for (int r = 0; r < n; r++) {
      float line[STRIP * LANES];
      for (int g = 0; g < STRIP; g++) OP(storeu_ps)(line + g * LANES, total[g][r]);
      memcpy(out + r * to + v, line, least(STRIP * LANES, stop - v) * sizeof(float));
    }
  }
}

/* out[n][start..stop) of n packed rows. */
TARGET void NAME(logits)(const void *weight, int64_t stride, int wide, int64_t start, int64_t stop, int64_t d, const void *packed,
                         int64_t n, float *out, int64_t to) {
  const char *w = weight;
  const float *h = packed;
#define CASE(x) case x: \
  if (wide) NAME(few)(w, stride, 1, start, stop, d, h, x, out, to); \
  else NAME(few)(w, stride, 0, start, stop, d, h, x, out, to); \
  break;
  switch (n) {
    CASE(1) CASE(2) CASE(3) CASE(4)
    default:
      if (wide) NAME(many)(w, stride, 1, start, stop, d, h, n, out, to);
      else NAME(many)(w, stride, 0, start, stop, d, h, n, out, to);
  }
#undef CASE
}
#undef vec
#undef INLINE
#undef COLUMNS
#undef FEW
#undef STRIP
#undef ROWS
#undef PANELS
