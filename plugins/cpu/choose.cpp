// Chooses the instruction set: once, by what the processor says, or by DSPARK_CPU.
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace dspark {
namespace {

struct Candidate {
  const Set* set;
  bool runs;
};

#if defined(__x86_64__) || defined(_M_X64)
uint64_t enabled_state() {  // register files that the operating system saves
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

struct Leaf {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  Leaf(uint32_t leaf, uint32_t sub) { __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(sub)); }
};

bool all_of(uint32_t value, std::initializer_list<int> bits) {
  for (const int bit : bits)
    if (!(value >> bit & 1)) return false;
  return true;
}
#endif

const std::string& wanted() {
  static const std::string name = [] {
    const char* given = std::getenv("DSPARK_CPU");
    return std::string(given ? given : "");
  }();
  return name;
}

struct Choice {
  const Set* set = nullptr;
  std::string error, running;

  Choice() {
#if defined(__x86_64__) || defined(_M_X64)
    bool avx2 = false, vnni = false, avx512 = false;
    const uint32_t last = Leaf(0, 0).a;
    const Leaf basic(1, 0);
    // FMA, OSXSAVE, AVX, F16C
    if (last >= 7 && all_of(basic.c, {12, 27, 28, 29}) && (enabled_state() & 6) == 6) {
      const Leaf more(7, 0);
      avx2 = all_of(more.b, {5});
      vnni = avx2 && more.a >= 1 && all_of(Leaf(7, 1).a, {4});
      // F, DQ, BW, VL; VNNI; and the wide registers are saved
      avx512 = avx2 && all_of(more.b, {16, 17, 30, 31}) && all_of(more.c, {11}) && (enabled_state() & 0xe0) == 0xe0;
    }
    const Candidate candidates[] = {{&kAvx512, avx512}, {&kAvxVnni, vnni}, {&kAvx2, avx2}, {&kPortable, true}};
#elif defined(__aarch64__)
#if defined(__linux__)
    const bool dot = getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
    const bool dot = true;                           // every such Mac has it
#endif
    const Candidate candidates[] = {{&kNeon, dot}, {&kPortable, true}};
#else
    const Candidate candidates[] = {{&kPortable, true}};
#endif
    for (const Candidate& c : candidates) {
      if (!c.runs) continue;
      running += (running.empty() ? "" : " ") + std::string(c.set->name);
      if (!set && (wanted().empty() || wanted() == c.set->name)) set = c.set;
    }
    if (!set) error = "DSPARK_CPU is '" + wanted() + "', which does not run on this machine; here run: " + running;
  }
};

const Choice& choice() {
  static const Choice made;
  return made;
}

}  // namespace

const Set* chosen_set() { return choice().set; }
const char* chosen_set_error() { return choice().error.c_str(); }
const char* sets_that_run() { return choice().running.c_str(); }

}  // namespace dspark
