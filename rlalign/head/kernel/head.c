/* The head kernel: which paths this processor and operating system can run, and one entry for all of them.
 *
 * Nothing here or in the paths is compiled for more than the baseline, except the functions that carry a `target`; so the library
 * loads anywhere, and a path is called only where `rlalign_host` and `rlalign_built` both name it.
 */
#define _GNU_SOURCE
#include "head.h"
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { AVX2 = 1, AVX512 = 2, AMX = 4 };

/* A compiler too old for a path leaves it out. */
#if defined RLALIGN_NO_AVX512
enum { BUILT = AVX2 };
#define CALL(f, ...) f##_avx2(__VA_ARGS__)
#elif defined RLALIGN_NO_AMX
enum { BUILT = AVX2 | AVX512 };
#define CALL(f, ...) (path == AVX2 ? f##_avx2(__VA_ARGS__) : f##_avx512(__VA_ARGS__))
#else
enum { BUILT = AVX2 | AVX512 | AMX };
#define CALL(f, ...) (path == AVX2 ? f##_avx2(__VA_ARGS__) : path == AVX512 ? f##_avx512(__VA_ARGS__) : f##_amx(__VA_ARGS__))
#endif

/* Which paths this library holds, as a sum of AVX2, AVX512 and AMX. */
int rlalign_built(void) { return BUILT; }

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

static int has(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

/* Which registers the operating system saves: 0x6 the 256-bit ones, 0xe0 more the 512-bit ones, 0x60000 the tiles. */
static uint32_t saved_registers(void) {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

/* Linux lends the tile registers to a process that asks. */
static int tiles_are_lent(void) { return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0; }

/* Which paths this processor and operating system can run, built or not. */
int rlalign_host(void) {
  uint32_t a, b, c, d, c1;
  if (!__get_cpuid(1, &a, &b, &c1, &d) || !has(c1, bit_OSXSAVE | bit_AVX | bit_FMA)) return 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  uint32_t saved = saved_registers();
  int found = 0;
  if (has(b, bit_AVX2) && has(saved, 0x6)) found |= AVX2;
  if (has(b, bit_AVX512F) && has(saved, 0xe6)) found |= AVX512;
  if ((found & AVX512) && has(d, 1u << 24 | 1u << 22) && has(saved, 0x600e6) && tiles_are_lent()) found |= AMX; /* tile, bf16 */
  return found;
}

/* Into how many panels n rows of hidden states are packed. */
int64_t rlalign_panels(int path, int64_t n) { return CALL(panels, n); }

/* Panels first to last of hidden [n][d]. packed: 64 * ceil(n / 16) * d bytes for all of them. */
void rlalign_pack(int path, const void *hidden, int64_t stride, int wide, int64_t n, int64_t d, int64_t first, int64_t last, void *packed) {
  CALL(pack, hidden, stride, wide, n, d, first, last, packed);
}

/* logits[n][start..stop) = packed hidden . weight[vocabulary][d]^T. */
void rlalign_logits(int path, const void *weight, int64_t stride, int wide, int64_t start, int64_t stop, int64_t d, const void *packed,
                    int64_t n, float *logits, int64_t to) {
  CALL(logits, weight, stride, wide, start, stop, d, packed, n, logits, to);
}
