/* 16 x 16 floats turned over in registers. Included by every path with 512-bit registers, under its own TARGET. */
TARGET static inline void NAME(transpose)(__m512 *r) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
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
      r[i + 4 * j] = _mm512_shuffle_f32x4(b[i + 4 * j], b[i + 4 * j + 8], 0x88);
      r[i + 4 * j + 8] = _mm512_shuffle_f32x4(b[i + 4 * j], b[i + 4 * j + 8], 0xdd);
    }
}
