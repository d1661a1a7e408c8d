// Sixteen float lanes: AVX-512 where the machine has it, plain loops (GCC/Clang vector types) elsewhere.
// Every multiply-add is an explicit fma, so that the bits do not depend on what the compiler contracts.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#define GW_AVX512 1
#endif

namespace gw {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) {  // round to nearest, ties to even
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

constexpr int LANES = 16;

#ifdef GW_AVX512
using Vec = __m512;
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
inline Vec load_n(const bf16* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline __m256i narrow(Vec x) {
#ifdef __AVX512BF16__
  // vcvtneps2bf16 rounds to nearest even (and flushes denormals, which no logit notices).
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  __m512i u = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(r, nan, 0x7fc0));
#endif
}
inline void store(bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
inline void store_n(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), x); }
inline void store_n(bf16* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), narrow(x));
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float reduce_add(Vec x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(Vec x) { return _mm512_reduce_max_ps(x); }
// Lane i: the sum over x[i], added in an order that does not depend on i. Vectors are halved in pairs: 45
// instructions for the 16 sums.
inline Vec reduce_each(const Vec (&x)[16]) {
  Vec quarter[4];  // block b of vector j: four partial sums of x[4 b + j]
  for (int j = 0; j < 4; ++j) {
    Vec half[2];
    for (int i = 0; i < 2; ++i) {
      const Vec &a = x[8 * i + j], &b = x[8 * i + 4 + j];
      half[i] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    quarter[j] = add(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
  }
  const Vec a = add(_mm512_unpacklo_ps(quarter[0], quarter[1]), _mm512_unpackhi_ps(quarter[0], quarter[1]));
  const Vec b = add(_mm512_unpacklo_ps(quarter[2], quarter[3]), _mm512_unpackhi_ps(quarter[2], quarter[3]));
  return add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
inline void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }
inline Vec keep(uint32_t mask, Vec x, float other) {
  return _mm512_mask_blend_ps(__mmask16(mask), _mm512_set1_ps(other), x);
}
inline Vec vexp(Vec x) {
  __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
  x = _mm512_min_ps(_mm512_set1_ps(88.7f), _mm512_max_ps(_mm512_set1_ps(-87.3f), x));
  Vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  Vec r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  Vec p = _mm512_set1_ps(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, _mm512_mul_ps(r, r), add(r, splat(1.0f)));
  p = _mm512_scalef_ps(p, n);
  return _mm512_mask_blend_ps(tiny, p, _mm512_setzero_ps());
}
#else
struct Vec {
  float v[LANES];
};
#define GW_EACH for (int i = 0; i < LANES; ++i)
inline float fma1(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;  // no instruction for it: two roundings, the same in every path
#endif
}
inline Vec splat(float x) { Vec r; GW_EACH r.v[i] = x; return r; }
inline Vec load(const float* p) { Vec r; std::memcpy(r.v, p, sizeof r.v); return r; }
inline Vec load(const bf16* p) { Vec r; GW_EACH r.v[i] = to_float(p[i]); return r; }
template <class T>
inline Vec load_n(const T* p, int n) { Vec r; GW_EACH r.v[i] = i < n ? to_float(p[i]) : 0.0f; return r; }
inline void store(float* p, const Vec& x) { std::memcpy(p, x.v, sizeof x.v); }
inline void store(bf16* p, const Vec& x) { GW_EACH p[i] = from_float<bf16>(x.v[i]); }
template <class T>
inline void store_n(T* p, const Vec& x, int n) { for (int i = 0; i < n; ++i) p[i] = from_float<T>(x.v[i]); }
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  Vec r; GW_EACH r.v[i] = fma1(a.v[i], b.v[i], c.v[i]); return r;
}
inline Vec add(const Vec& a, const Vec& b) { Vec r; GW_EACH r.v[i] = a.v[i] + b.v[i]; return r; }
inline Vec mul(const Vec& a, const Vec& b) { Vec r; GW_EACH r.v[i] = a.v[i] * b.v[i]; return r; }
inline Vec div(const Vec& a, const Vec& b) { Vec r; GW_EACH r.v[i] = a.v[i] / b.v[i]; return r; }
inline Vec vmax(const Vec& a, const Vec& b) { Vec r; GW_EACH r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return r; }
inline float reduce_add(Vec x) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  return x.v[0];
}
inline Vec reduce_each(const Vec (&x)[16]) {
  Vec r; GW_EACH r.v[i] = reduce_add(x[i]); return r;
}
inline void prefetch(const char* p) { __builtin_prefetch(p); }
inline float reduce_max(Vec x) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] = x.v[i] > x.v[i + half] ? x.v[i] : x.v[i + half];
  return x.v[0];
}
inline Vec keep(uint32_t mask, const Vec& x, float other) {
  Vec r; GW_EACH r.v[i] = (mask >> i) & 1 ? x.v[i] : other; return r;
}
inline Vec vexp(const Vec& x0) {
  Vec out;
  GW_EACH {
    float x = x0.v[i] < -87.3f ? -87.3f : (x0.v[i] > 88.7f ? 88.7f : x0.v[i]);
    float n = __builtin_rintf(x * 1.44269504f);
    float r = fma1(n, 2.12194440e-4f, fma1(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = fma1(p, r, 1.3981999507e-3f);
    p = fma1(p, r, 8.3334519073e-3f);
    p = fma1(p, r, 4.1665795894e-2f);
    p = fma1(p, r, 1.6666665459e-1f);
    p = fma1(p, r, 5.0000001201e-1f);
    p = fma1(p, r * r, r + 1.0f);
    // 2^n in two factors, so that n = 128 does not overflow the exponent field.
    int32_t whole = n == n ? int32_t(n) : 0, half = whole / 2;
    uint32_t b0 = uint32_t(half + 127) << 23, b1 = uint32_t(whole - half + 127) << 23;
    float f0, f1;
    std::memcpy(&f0, &b0, 4);
    std::memcpy(&f1, &b1, 4);
    out.v[i] = x0.v[i] < -87.3f ? 0.0f : p * f0 * f1;
  }
  return out;
}
#undef GW_EACH
#endif

template <class T>
inline Vec load_up_to(const T* p, int64_t n) { return n >= LANES ? load(p) : load_n(p, int(n)); }
template <class T>
inline void store_up_to(T* p, Vec x, int64_t n) {
  if (n >= LANES) store(p, x);
  else store_n(p, x, int(n));
}

// Transpose a 16x16 block of 32-bit words; row i is at `rows[i]` (null rows read as zero).
// Row i of the result goes to `out + i * stride` (in words).
inline void transpose16(const void* const rows[16], uint32_t* out, int64_t stride) {
#ifdef GW_AVX512
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = rows[i] ? _mm512_loadu_si512(rows[i]) : _mm512_setzero_si512();
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + (0 + i) * stride, _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
    _mm512_storeu_si512(out + (8 + i) * stride, _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
    _mm512_storeu_si512(out + (4 + i) * stride, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
    _mm512_storeu_si512(out + (12 + i) * stride, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      uint32_t w = 0;
      if (rows[i]) std::memcpy(&w, static_cast<const char*>(rows[i]) + 4 * j, 4);
      out[j * stride + i] = w;
    }
#endif
}

}  // namespace gw
