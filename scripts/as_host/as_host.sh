#!/usr/bin/env bash
# as_host.sh KIND COMMAND...: run COMMAND and its children as on an x86-64 processor of a lesser kind.
#   avx2         no AVX-512, no bf16, no AMX (AMD Zen 3)
#   avx512       AVX-512 without bf16 (Intel Ice Lake)
#   avx512_bf16  AVX-512 with bf16 (AMD Zen 4)
# It hides instructions from software that asks; the silicon would still execute them, so it does not catch one that is used
# without asking. Needs Linux on x86-64 with CPUID faulting (cpuid_fault in /proc/cpuinfo), unshare and a C compiler.
set -euo pipefail

refuse() { echo "as_host: $*" >&2; exit 125; }
[ $# -ge 2 ] || refuse "expected a kind (avx2, avx512, avx512_bf16) and a command"
kind=$1; shift
has() { grep -qw "$1" /proc/cpuinfo; }

gone='amx_[a-z0-9]*|avx512_fp16|avx_vnni[a-z0-9_]*|avx_ifma|avx_ne_convert|avx10[a-z0-9_.]*' amd=25
case $kind in
  avx2) gone+='|avx512[a-z0-9_]*'; needed=avx2 model=1 ;;
  avx512) gone+='|avx512_bf16'; needed=avx512_vnni amd='' model='' ;;
  avx512_bf16) needed=avx512_bf16 model=17 ;;
  *) refuse "unknown kind '$kind'; expected avx2, avx512 or avx512_bf16" ;;
esac
[ "$(uname -sm)" = "Linux x86_64" ] || refuse "needs Linux on x86-64, this is $(uname -sm)"
has cpuid_fault || refuse "this processor or hypervisor has no CPUID faulting (cpuid_fault in /proc/cpuinfo)"
has "$needed" || refuse "this processor has no $needed, and features can only be hidden"
command -v unshare >/dev/null || refuse "needs unshare (util-linux)"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
built=${XDG_CACHE_HOME:-$HOME/.cache}/rlalign/as_host
mkdir -p "$built"
library=$built/as_host-$(cksum < "$here/as_host.c" | cut -d' ' -f1).so
if [ ! -e "$library" ]; then
  command -v "${CC:-cc}" >/dev/null || refuse "needs a C compiler (${CC:-cc} was not found; name one with CC)"
  "${CC:-cc}" -O2 -shared -fPIC -o "$library.$$" "$here/as_host.c" -ldl
  mv "$library.$$" "$library"
fi

hidden="s/ ($gone)\\b//g; s/^(model name.*: ).*/\\1rlalign $kind host/"
if [ -n "$amd" ]; then
  hidden+="; s/GenuineIntel/AuthenticAMD/; s/^(cpu family.*: ).*/\\1$amd/; s/^(model\\t.*: ).*/\\1$model/"
fi
cpuinfo=$built/cpuinfo.$kind.$$
sed -E "$hidden" /proc/cpuinfo > "$cpuinfo"

private=(unshare --mount)  # the name of a mounted file may go; the mount keeps it
[ "$(id -u)" = 0 ] || private=(unshare --map-current-user --mount --keep-caps)
if ! "${private[@]}" mount --bind "$cpuinfo" /proc/cpuinfo 2>/dev/null; then
  rm -f "$cpuinfo"
  refuse "this user may not mount over /proc/cpuinfo, even in a namespace of its own (a container?)"
fi
# torch's cache of compiled graphs does not record the processor, so another's code would be used (docs/upstream.md).
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$built/inductor-$kind}
export AS_HOST=$kind AS_HOST_LIBRARY=$library AS_HOST_CPUINFO=$cpuinfo
# shellcheck disable=SC2016  # expanded inside
exec "${private[@]}" bash -c 'mount --bind "$AS_HOST_CPUINFO" /proc/cpuinfo && rm -f "$AS_HOST_CPUINFO"
  export LD_PRELOAD="$AS_HOST_LIBRARY${LD_PRELOAD:+:$LD_PRELOAD}"
  unset AS_HOST_LIBRARY AS_HOST_CPUINFO
  exec "$@"' _ "$@"
