// The engine for bfloat16 on machines without AMX tiles whose vectors multiply pairs (AVX512-BF16).
#pragma once
#include "attention_rows.h"

#if defined(GW_AVX512) && defined(__AVX512BF16__)
#define GW_PAIRS 1

namespace gw {

// Two rows side by side: word i of the result is (even[i], odd[i]); null rows read as zeros. The words of 16 columns
// go to `to`, those of the next 16 to `to + step`.
inline void interleave(const bf16* even, const bf16* odd, int64_t columns, bf16* to, int64_t step) {
  const __m512i word = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i twice = _mm512_or_si512(word, _mm512_slli_epi32(word, 16));  // 0, 0, 1, 1, ... 15, 15
  const __m512i low = _mm512_add_epi16(twice, _mm512_set1_epi32(32 << 16));
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t c = 0; c < columns; c += 32, to += 2 * step) {
    const __mmask32 mask = columns - c >= 32 ? ~__mmask32(0) : __mmask32((1u << (columns - c)) - 1);
    const __m512i a = even ? _mm512_maskz_loadu_epi16(mask, even + c) : _mm512_setzero_si512();
    const __m512i b = odd ? _mm512_maskz_loadu_epi16(mask, odd + c) : _mm512_setzero_si512();
    _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
    if (c + 16 < columns) _mm512_store_si512(to + step, _mm512_permutex2var_epi16(a, high, b));
  }
}

// Scores: pairs along d of 16 keys, transposed once a chunk, times a row's pair. Values: pairs of keys, interleaved
// once a chunk, times a row's pair of weights, rounded to bfloat16. Sums are in float32, in order of d and of keys.
class PairEngine {
 public:
  static constexpr bool ASKS_AHEAD = false;  // for what follows the chunk that is staged
  PairEngine(int64_t d, int64_t e, int tiles) : d_(d), e_(e), words_(round_up(d, 32) / 2), ep_(round_up(e, 16)) {
    q_ = queries_.get<uint32_t>(tiles * TILE * words_);
    k_ = keys_.get<uint32_t>(CHUNK * words_);
    v_ = values_.get<bf16>(CHUNK * ep_);
    rows_ = staged_.get<bf16>(16 * 2 * words_);
  }

  void query(int slot, const bf16* const rows[TILE]) {
    for (int r = 0; r < TILE; ++r) pad(rows[r], reinterpret_cast<bf16*>(q_ + (slot * TILE + r) * words_));
  }

  template <class Keys, class Values>
  void stage(const Keys& keys, const Values& values, int64_t chunk) {
    const int64_t at = chunk * CHUNK;
    for (int block = 0; block < CHUNK / 16; ++block) {
      const bf16 *run = keys.run(at + block * 16), *rows[16];
      for (int i = 0; i < 16; ++i) {
        rows[i] = run ? run + i * keys.stride : keys.at(at + block * 16 + i);
        if (d_ % 32 == 0 || !rows[i]) continue;
        pad(rows[i], rows_ + i * 2 * words_);
        rows[i] = rows_ + i * 2 * words_;
      }
      for (int64_t w = 0; w < words_; w += 16) {
        const void* from[16];
        for (int i = 0; i < 16; ++i) from[i] = rows[i] ? rows[i] + 2 * w : nullptr;
        transpose16(from, k_ + (block * words_ + w) * 16, 16);
      }
    }
    for (int block = 0; block < CHUNK; block += 16) {
      const bf16* run = values.run(at + block);
      for (int i = 0; i < 16; i += 2) {
        const bf16* even = run ? run + i * values.stride : values.at(at + block + i);
        const bf16* odd = run ? even + values.stride : values.at(at + block + i + 1);
        interleave(even, odd, e_, v_ + (block + i) * ep_, 32);
      }
    }
  }

  void scores(int slot, int rows, float* out) const {
    for (int r = 0; r < rows; r += 4)
      for (int block = 0; block < CHUNK / 16; block += 4)
        multiply<4>(q_ + (slot * TILE + r) * words_, words_, k_ + block * words_ * 16, words_ * 16, 16, (d_ + 1) / 2,
                    out + r * CHUNK + block * 16, CHUNK);
  }

  void weigh(int rows, const float* weights, float* weighted) const {
    alignas(64) uint32_t pairs[TILE * CHUNK / 2];
    for (int64_t i = 0; i < round_up(rows, 4) * CHUNK; i += 32)
      _mm512_store_si512(pairs + i / 2, (__m512i)_mm512_cvtne2ps_pbh(load(weights + i + 16), load(weights + i)));
    const auto* v = reinterpret_cast<const uint32_t*>(v_);
    for (int r = 0; r < rows; r += 4) {
      const uint32_t* p = pairs + r * CHUNK / 2;
      float* out = weighted + r * ep_;
      int64_t e = 0;
      for (; e + 64 <= ep_; e += 64) multiply<4>(p, CHUNK / 2, v + e, 16, ep_, CHUNK / 2, out + e, ep_);
      for (; e < ep_; e += 16) multiply<1>(p, CHUNK / 2, v + e, 16, ep_, CHUNK / 2, out + e, ep_);
    }
  }

 private:
  // out[i][lane of vector j] = the sum over `count` words of row i's word times the word of the lane.
  // Vector j of word c is at vectors + j * apart + c * step.
  template <int NV>
  static void multiply(const uint32_t* rows, int64_t row_step, const uint32_t* vectors, int64_t apart, int64_t step,
                       int64_t count, float* out, int64_t out_step) {
    Vec acc[4][NV];
    for (auto& row : acc)
      for (Vec& sum : row) sum = splat(0.0f);
    for (int64_t c = 0; c < count; ++c, vectors += step) {
      __m512bh v[NV];
      for (int j = 0; j < NV; ++j) v[j] = (__m512bh)_mm512_loadu_si512(vectors + j * apart);
      for (int i = 0; i < 4; ++i) {
        const auto x = (__m512bh)_mm512_set1_epi32(int(rows[i * row_step + c]));
        for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, v[j]);
      }
    }
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < NV; ++j) store(out + i * out_step + j * 16, acc[i][j]);
  }

  // A row of d elements, or none, with zeros up to the next whole vector.
  void pad(const bf16* from, bf16* to) const {
    const int64_t n = from ? d_ : 0;
    if (n) std::memcpy(to, from, size_t(n) * 2);
    std::fill_n(reinterpret_cast<uint16_t*>(to) + n, 2 * words_ - n, uint16_t(0));
  }

  int64_t d_, e_, words_, ep_;
  Scratch queries_, keys_, values_, staged_;
  uint32_t *q_, *k_;
  bf16 *v_, *rows_;
};

}  // namespace gw
#endif
