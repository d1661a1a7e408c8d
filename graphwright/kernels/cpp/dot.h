// Dot products of rows: one accumulator vector an output, fed in order of k and reduced in a fixed order.
#pragma once
#include "vec.h"

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

// sums[n][m] = weight row n times input row m; the blocking (NB, MB) does not show in the bits.
template <class T, int NB, int MB>
void dot_block(const T* w, int64_t stride, const T* const (&x)[MB], int64_t k, float (*sums)[MB]) {
  using D = Dot<T>;
  Vec acc[NB][MB];
  for (int n = 0; n < NB; ++n)
    for (int m = 0; m < MB; ++m) acc[n][m] = splat(0.0f);
  int64_t at = 0;
  for (; at + D::STEP <= k; at += D::STEP) {
    typename D::Reg wr[NB];
    for (int n = 0; n < NB; ++n) wr[n] = D::get(w + n * stride + at);
    for (int m = 0; m < MB; ++m) {
      auto xr = D::get(x[m] + at);
      for (int n = 0; n < NB; ++n) acc[n][m] = D::mac(acc[n][m], wr[n], xr);
    }
  }
  if (at < k) {
    int rest = int(k - at);
    for (int m = 0; m < MB; ++m) {
      auto xr = D::get_n(x[m] + at, rest);
      for (int n = 0; n < NB; ++n) acc[n][m] = D::mac(acc[n][m], D::get_n(w + n * stride + at, rest), xr);
    }
  }
  for (int n = 0; n < NB; ++n)
    for (int m = 0; m < MB; ++m) sums[n][m] = reduce_add(acc[n][m]);
}

}  // namespace gw
