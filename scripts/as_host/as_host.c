/* Show a process and its children a lesser x86-64 processor: the CPUID instruction is made to fault (arch_prctl ARCH_CPUID),
 * and the fault is answered with the real leaves less what the wanted processor lacks. To be preloaded; AS_HOST names the kind:
 * avx2 (like Zen 3), avx512 (like Ice Lake, no bf16), avx512_bf16 (like Zen 4). Features are only ever taken away.
 *
 * execve switches the fault off, so a child without this library (static, or with handlers of its own like Go's) sees the truth. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_CPUID = 0x1012 };
typedef enum { AVX2, AVX512, AVX512_BF16 } Kind;
typedef uint32_t Leaf[4]; /* eax, ebx, ecx, edx */
typedef int (*SetAction)(int, const struct sigaction *, struct sigaction *);
typedef int (*SetMask)(int, const sigset_t *, sigset_t *);

static Kind kind;
static int armed;
static struct sigaction theirs; /* what the program believes its SIGSEGV handler to be */

#define BIT(n) (1u << (n))
static void name_amd(Leaf r, uint32_t highest) {
  r[0] = highest;
  memcpy(&r[1], "Auth", 4);
  memcpy(&r[3], "enti", 4);
  memcpy(&r[2], "cAMD", 4);
}

static void take_features_away(uint32_t leaf, uint32_t sub, Leaf r) {
  if (leaf == 7 && sub == 0) {
    r[3] &= ~(BIT(22) | BIT(23) | BIT(24) | BIT(25)); /* AMX, AVX512-FP16 */
    if (kind == AVX2) {
      r[0] = 0; /* no further subleaf */
      r[1] &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)); /* AVX-512 F, DQ, .. VL */
      r[2] &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));                                 /* VBMI, VNNI, .. */
      r[3] &= ~(BIT(2) | BIT(3) | BIT(8));
    }
  } else if (leaf == 7 && sub == 1) {
    r[0] &= kind == AVX512_BF16 ? BIT(5) : 0;
    r[1] = r[2] = r[3] = 0;
  } else if (leaf == 7 || leaf == 0x1D || leaf == 0x1E) {
    memset(r, 0, sizeof(Leaf)); /* further features, AMX tiles */
  } else if (leaf == 0xD && sub == 0) { /* register state: x87, SSE, AVX; opmask and zmm; no tiles */
    r[0] &= kind == AVX2 ? 0x7 : 0xE7;
    r[1] = r[2] = kind == AVX2 ? 0x340 : 0xA80;
    r[3] = 0;
  }
}

static void look_like_amd(uint32_t leaf, uint32_t sub, Leaf r) {
  static const Leaf caches[4] = {{0x121, 0x01C0003F, 63, 0}, {0x122, 0x01C0003F, 63, 0},
                                 {0x143, 0x01C0003F, 1023, 2}, {0x163, 0x03C0003F, 32767, 1}};
  if (leaf == 0) name_amd(r, 16);
  if (leaf == 0x80000000) name_amd(r, 0x80000021);
  if (leaf == 1) r[0] = kind == AVX2 ? 0x00A00F11 : 0x00A10F11;
  if (leaf == 2 || leaf == 4 || leaf == 0x14 || leaf == 0x1A) memset(r, 0, sizeof(Leaf)); /* Intel's */
  if (leaf == 0x80000001) r[2] |= BIT(22); /* topology extensions: where AMD lists caches */
  if (leaf == 0x80000005) r[2] = r[3] = 0x20080140;
  if (leaf == 0x80000006) { r[2] = 0x02006140; r[3] = 0x01009140; }
  if (leaf == 0x8000001D) memcpy(r, caches[sub < 4 ? sub : 0], sizeof(Leaf));
  if (leaf == 0x8000001D && sub >= 4) memset(r, 0, sizeof(Leaf));
}

static void answer(uint32_t leaf, uint32_t sub, Leaf r) {
  __cpuid_count(leaf, sub, r[0], r[1], r[2], r[3]);
  take_features_away(leaf, sub, r);
  if (kind != AVX512) look_like_amd(leaf, sub, r);
}

static void die_of_it(void) {
  struct { void (*handler)(int); unsigned long flags; void *restorer; uint64_t mask; } plain = {0};
  syscall(SYS_rt_sigaction, SIGSEGV, &plain, NULL, 8);
  raise(SIGSEGV);
}

static void on_fault(int number, siginfo_t *info, void *context) {
  greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *at = (const uint8_t *)g[REG_RIP];
  if (info->si_code == SI_KERNEL && at[0] == 0x0F && at[1] == 0xA2) {
    int saved = errno;
    Leaf r;
    syscall(SYS_arch_prctl, ARCH_CPUID, 1);
    answer((uint32_t)g[REG_RAX], (uint32_t)g[REG_RCX], r);
    syscall(SYS_arch_prctl, ARCH_CPUID, 0);
    errno = saved;
    g[REG_RAX] = r[0];
    g[REG_RBX] = r[1];
    g[REG_RCX] = r[2];
    g[REG_RDX] = r[3];
    g[REG_RIP] += 2;
  } else if (theirs.sa_flags & SA_SIGINFO) {
    theirs.sa_sigaction(number, info, context);
  } else if (theirs.sa_handler != SIG_DFL && theirs.sa_handler != SIG_IGN) {
    theirs.sa_handler(number);
  } else {
    die_of_it();
  }
}

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

/* The program's own handler of SIGSEGV (Python's faulthandler, Java) is kept aside, and called for faults that are not CPUID. */
int sigaction(int number, const struct sigaction *new, struct sigaction *old) {
  if (number != SIGSEGV || !armed) return ((SetAction)next("sigaction"))(number, new, old);
  struct sigaction before = theirs;
  if (new) theirs = *new;
  if (old) *old = before;
  return 0;
}

sighandler_t signal(int number, sighandler_t handler) {
  struct sigaction new = {.sa_handler = handler, .sa_flags = SA_RESTART}, old;
  return sigaction(number, &new, &old) ? SIG_ERR : old.sa_handler;
}

/* A thread that blocks every signal would die of its first CPUID. */
static int set_mask(const char *name, int how, const sigset_t *set, sigset_t *old) {
  sigset_t open;
  if (set && armed && how != SIG_UNBLOCK) {
    open = *set;
    sigdelset(&open, SIGSEGV);
    set = &open;
  }
  return ((SetMask)next(name))(how, set, old);
}
int sigprocmask(int how, const sigset_t *set, sigset_t *old) { return set_mask("sigprocmask", how, set, old); }
int pthread_sigmask(int how, const sigset_t *set, sigset_t *old) { return set_mask("pthread_sigmask", how, set, old); }

/* Go's runtime installs its handlers by system call and would take our fault for its own. */
static int is_go_program(void) {
  static const char mark[] = {'\xff', ' ', 'G', 'o', ' ', 'b', 'u', 'i', 'l', 'd', 'i', 'n', 'f', ':'};
  int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC), found = 0;
  struct stat about;
  if (file < 0) return 0;
  if (!fstat(file, &about) && about.st_size > 0) {
    void *bytes = mmap(NULL, about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (bytes != MAP_FAILED) {
      found = memmem(bytes, about.st_size, mark, sizeof mark) != NULL;
      munmap(bytes, about.st_size);
    }
  }
  close(file);
  return found;
}

__attribute__((constructor)) static void start(void) {
  const char *as = getenv("AS_HOST");
  if (!as || is_go_program()) return;
  kind = !strcmp(as, "avx2") ? AVX2 : !strcmp(as, "avx512") ? AVX512 : AVX512_BF16;
  struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
  ((SetAction)next("sigaction"))(SIGSEGV, &ours, &theirs);
  if (syscall(SYS_arch_prctl, ARCH_CPUID, 0)) {
    fprintf(stderr, "as_host: this kernel or processor has no CPUID faulting (cpuid_fault in /proc/cpuinfo)\n");
    _exit(125);
  }
  armed = 1;
}
