// Dot products of rows: one accumulator vector an output, fed in order of k and reduced in a fixed order.
#pragma once
#include "vec.h"

#define GW_UNROLL _Pragma("GCC unroll 16")  // accumulators stay in registers
#define GW_NOINLINE __attribute__((noinline))

namespace gw {

// Elementary step of a dot product: STEP elements of weight and input into one accumulator.
template <class T>
struct Dot {
  static constexpr int STEP = LANES;
  using Reg = Vec;
  static Reg get(const T* p) { return load(p); }
  static Reg get_n(const T* p, int n) { return load_n(p, n); }
  static Vec mac(Vec acc, Reg w, Reg x) { return fma(w, x, acc); }
};
#if defined(GW_AVX512) && defined(__AVX512BF16__)
template <>
struct Dot<bf16> {
  static constexpr int STEP = 2 * LANES;
  using Reg = __m512i;
  static Reg get(const bf16* p) { return _mm512_loadu_si512(p); }
  static Reg get_n(const bf16* p, int n) { return _mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), p); }
  static Vec mac(Vec acc, Reg w, Reg x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
};
#endif

// Memory [at, end) that is asked for while something else is computed, some cache lines at every step of it.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  int64_t bytes = 0;  // a step
  void step() {
    for (const char* stop = end - at < bytes ? end : at + bytes; at < stop; at += 64) prefetch(at);
  }
};

// Lane m * NB + n: weight row n times input row m. The blocking (NB, MB) does not show in the bits.
// A function of its own, so that the loop has the registers to itself.
template <class T, int NB, int MB>
GW_NOINLINE Vec dot_block(const T* w, int64_t stride, const T* const (&x)[MB], int64_t k, Ahead& asked) {
  static_assert(NB * MB <= LANES);
  using D = Dot<T>;
  Vec acc[LANES];
  for (Vec& sum : acc) sum = splat(0.0f);
  const auto step = [&](auto get, int64_t at) {
    typename D::Reg wr[NB];
    for (int n = 0; n < NB; ++n) wr[n] = get(w + n * stride + at);
    GW_UNROLL for (int m = 0; m < MB; ++m) {
      const auto xr = get(x[m] + at);
      GW_UNROLL for (int n = 0; n < NB; ++n) acc[m * NB + n] = D::mac(acc[m * NB + n], wr[n], xr);
    }
  };
  Ahead ahead = asked;
  int64_t at = 0;
  for (; at + D::STEP <= k; at += D::STEP) {
    step([](const T* p) { return D::get(p); }, at);
    ahead.step();
  }
  if (at < k) step([rest = int(k - at)](const T* p) { return D::get_n(p, rest); }, at);
  asked = ahead;
  return reduce_each(acc);
}

}  // namespace gw
