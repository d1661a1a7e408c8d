// Pages of a packed store to rows of numbers.
#pragma once
#include "code_planes.h"
#include "packed.h"

namespace gw {

#ifdef GW_AVX512
// Sixteen codes, a byte each, as numbers or as what they stand for in a table.
inline __m512i wide(__m128i codes) { return _mm512_cvtepu8_epi32(codes); }
inline Vec numbers16(__m128i codes) { return _mm512_cvtepi32_ps(wide(codes)); }
inline Vec pick16(__m128i codes, Vec table) { return _mm512_permutexvar_ps(wide(codes), table); }
inline void store32(float* out, Vec low, Vec high) {
  store(out, low);
  store(out + 16, high);
}
inline void store32(bf16* out, Vec low, Vec high) {
#ifdef __AVX512BF16__
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
  store(out, low);
  store(out + 16, high);
#endif
}

// What 32 codes of at most four bits stand for, rounded once for all of them.
inline Vec rounded(Vec table, float*) { return table; }
inline __m512i rounded(Vec table, bf16*) { return _mm512_castsi256_si512(narrow(table)); }
inline void pick32(__m256i codes, Vec table, float* out) {
  store32(out, pick16(_mm256_castsi256_si128(codes), table), pick16(_mm256_extracti128_si256(codes, 1), table));
}
inline void pick32(__m256i codes, __m512i table, bf16* out) {
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table));
}
#else
inline Vec numbers16(const uint8_t* codes) {
  Vec x;
  for (int i = 0; i < LANES; ++i) x.v[i] = codes[i];
  return x;
}
inline Vec pick16(const uint8_t* codes, const Vec& table) {
  Vec x;
  for (int i = 0; i < LANES; ++i) x.v[i] = table.v[codes[i] % LANES];
  return x;
}
#endif

// Reads runs of tokens of a packed store's pages.
template <class T>
class PageReader {
 public:
  static constexpr int64_t CHUNK_ROWS = 128;
  explicit PageReader(const PackedStore<T>& store)
      : store_(store), planes_(store.d, std::min(store.pages.bits, 8)), stride_((store.d + 63) / 64 * 64) {
    rows_ = row_memory_.get<T>(CHUNK_ROWS * stride_);
    codes_ = code_memory_.get<uint8_t>(CHUNK_ROWS * stride_);
    factors_ = factor_memory_.get<float>(2 * std::max(stride_, CHUNK_ROWS));
    std::fill_n(codes_, CHUNK_ROWS * stride_, uint8_t(0));
    std::fill_n(factors_, 2 * stride_, 0.0f);  // channels that only fill up a vector
  }
  int64_t stride() const { return stride_; }

  // Tokens [from, to) of one chunk of 128; token n goes to row n % 128 of what is returned.
  const T* read(int64_t row, int64_t group, int64_t from, int64_t to) {
    const int64_t size = store_.page_tokens, first = store_.first_tokens;
    while (from < to) {
      const int64_t page = (from - first) / size, place = (from - first) % size;
      const int64_t n = std::min(size - place, to - from);
      const Place at{row, page % store_.page_count, group, place};
      next_ = to_next(at);
      read_run(at, n, rows_ + from % CHUNK_ROWS * stride_);
      from += n;
    }
    return rows_;
  }

  // Tokens [from, from + n) of one page go to rows `to` and those that follow; `ahead` is a token of a page that will
  // be read later, or none if < 0.
  void read_page(int64_t row, int64_t group, int64_t from, int64_t n, int64_t to, int64_t ahead) {
    const int64_t at = from - store_.first_tokens, size = store_.page_tokens, count = store_.page_count;
    const Place place{row, at / size % count, group, at % size};
    next_ = ahead < 0 ? 0 : ((ahead - store_.first_tokens) / size % count - place.page) * store_.pages.c_page;
    read_run(place, n, rows_ + to * stride_);
  }
  T* rows() const { return rows_; }

 private:
  struct Place {
    int64_t row, page, group, token;
  };

  // Bytes from a run of codes to the same place of the page that the next chunk begins with.
  int64_t to_next(const Place& at) const {
    const int64_t pages = std::max<int64_t>(1, CHUNK_ROWS / store_.page_tokens);
    return ((at.page + pages) % store_.page_count - at.page) * store_.pages.c_page;
  }

  void read_run(const Place& at, int64_t n, T* out) {
    const Pages& p = store_.pages;
    const uint8_t* codes =
        p.codes + at.row * p.c_batch + at.page * p.c_page + at.group * p.c_group + at.token * p.c_token;
    if (p.bits == 16) return copy(reinterpret_cast<const bf16*>(codes), p.c_token / 2, n, out);
    const bf16* scale = p.scale + at.row * p.s_batch + at.page * p.s_page + at.group * p.s_group + at.token * p.s_token;
    const bf16* low =
        p.low ? p.low + at.row * p.l_batch + at.page * p.l_page + at.group * p.l_group + at.token * p.l_token : nullptr;
    if (p.by_channel) by_channel(codes, scale, low, n, out);
    else by_token(codes, scale, low, n, out);
  }

  void copy(const bf16* from, int64_t stride, int64_t n, T* out) const {
    for (int64_t i = 0; i < n; ++i, from += stride, out += stride_)
      for (int64_t c = 0; c < store_.d; c += 2 * LANES) {
        ask(reinterpret_cast<const uint8_t*>(from + c));
        for (int64_t h = c; h < std::min(c + 2 * LANES, store_.d); h += LANES) copy16(from + h, store_.d - h, out + h);
      }
  }
  static void copy16(const bf16* from, int64_t n, float* out) { store(out, load_up_to(from, n)); }
  static void copy16(const bf16* from, int64_t n, bf16* out) {
    if (n >= LANES) std::memcpy(out, from, 2 * LANES);
    else std::memcpy(out, from, size_t(n) * 2);
  }

  // Asks for the next chunk's codes while this chunk's are worked on.
  void ask(const uint8_t* codes) const { __builtin_prefetch(codes + next_, 0, 2); }

  // m and a of numbers from their scales and lows.
  float factor(const bf16* scale) const { return to_float(*scale) * store_.pages.factor; }
  static float addend(const bf16* low, float m) { return low ? to_float(*low) + m : 0.0f; }

  // A code is a number (`code * m + a`) or, with up to four bits, an index of a table.
  bool tabled() const { return store_.pages.bits <= 4; }
  void fold_step(float& m, float& a) const {
    if (tabled()) return;
    a = std::fma(m, store_.pages.offset, a);
    m *= store_.pages.step;
  }

  void by_token(const uint8_t* codes, const bf16* scale, const bf16* low, int64_t n, T* out) {
    const Pages& p = store_.pages;
    const int64_t runs = store_.d / p.run;
    float *m = factors_, *a = factors_ + CHUNK_ROWS;
    const Rows rows = rows_of(codes, n);
    for (int64_t r = 0; r < runs; ++r) {
      for (int64_t i = 0; i < n; ++i) {
        m[i] = factor(scale + i * p.s_token + r);
        a[i] = addend(low ? low + i * p.l_token + r : nullptr, m[i]);
        fold_step(m[i], a[i]);
      }
      if (tabled()) token_rows<true>(rows, m, a, n, r * p.run, out);
      else token_rows<false>(rows, m, a, n, r * p.run, out);
    }
  }

  void by_channel(const uint8_t* codes, const bf16* scale, const bf16* low, int64_t n, T* out) {
    float *m = factors_, *a = factors_ + stride_;
    for (int64_t c = 0; c < store_.d; ++c) {
      m[c] = factor(scale + c);
      a[c] = addend(low ? low + c : nullptr, m[c]);
      fold_step(m[c], a[c]);
    }
    const Rows rows = rows_of(codes, n);
    if (tabled()) channel_rows<true>(rows, m, a, n, out);
    else channel_rows<false>(rows, m, a, n, out);
  }

  // Rows of codes, packed or a byte each.
  struct Rows {
    const uint8_t* codes;
    int64_t step;
    bool packed;
  };

#ifdef GW_AVX512
  Rows rows_of(const uint8_t* codes, int64_t n) {
    if (planes_.fetch(0, [](const auto&) {})) return {codes, store_.pages.c_token, true};
    return unpacked(codes, n);
  }

  // Calls `body` with a function that gives 64 codes of a row.
  template <class F>
  void fetch(const Rows& rows, int64_t block, F&& body) const {
    if (rows.packed) planes_.fetch(block, body);
    else body([=](const uint8_t* row) { return _mm512_loadu_si512(row + 64 * block); });
  }

  // Features at ... at + run of n tokens, each token with its m and a.
  template <bool TABLED>
  void token_rows(const Rows& rows, const float* m, const float* a, int64_t n, int64_t at, T* out) const {
    const Vec levels = load(store_.pages.levels);
    const int64_t end = at + store_.pages.run, stride = stride_;
    if (store_.pages.bits == 8 && rows.packed) return byte_rows(rows, m, a, n, at, end, out);
    for (int64_t block = at / 64; block * 64 < end; ++block) {
      const bool first = at <= block * 64, second = end > block * 64 + 32;
      fetch(rows, block, [&](const auto& codes64) {
        const uint8_t* row = rows.codes;
        T* to = out + block * 64;
        for (int64_t i = 0; i < n; ++i, row += rows.step, to += stride) {
          if (rows.packed) ask(row + block * 64);
          const __m512i codes = codes64(row);
          const __m256i low = _mm512_castsi512_si256(codes), high = _mm512_extracti64x4_epi64(codes, 1);
          const Vec by = splat(m[i]), plus = splat(a[i]);
          if constexpr (TABLED) {
            const auto table = rounded(fma(levels, by, plus), to);
            if (first) pick32(low, table, to);
            if (second) pick32(high, table, to + 32);
          } else {
            if (first) scale32(low, by, plus, by, plus, to);
            if (second) scale32(high, by, plus, by, plus, to + 32);
          }
        }
      });
    }
  }
  // The same for codes that are bytes as they lie, in whole vectors.
  void byte_rows(const Rows& rows, const float* m, const float* a, int64_t n, int64_t at, int64_t end, T* out) const {
    const uint8_t* row = rows.codes;
    const auto number = [](const uint8_t* some, Vec by, Vec plus) {
      return fma(numbers16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(some))), by, plus);
    };
    for (int64_t i = 0; i < n; ++i, row += rows.step, out += stride_) {
      const Vec by = splat(m[i]), plus = splat(a[i]);
      for (int64_t c = at; c < end; c += 32) {
        if (c % 64 == 0) ask(row + c);
        store32(out + c, number(row + c, by, plus), number(row + c + 16, by, plus));
      }
    }
  }
  static void scale32(__m256i codes, Vec m0, Vec a0, Vec m1, Vec a1, T* to) {
    const __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);
    store32(to, fma(numbers16(low), m0, a0), fma(numbers16(high), m1, a1));
  }

  template <bool TABLED>
  void channel_rows(const Rows& rows, const float* m, const float* a, int64_t n, T* out) const {
    const Vec levels = load(store_.pages.levels);
    const int64_t stride = stride_;
    for (int64_t block = 0; block * 64 < store_.d; ++block) {
      Vec by[4], plus[4];
      for (int i = 0; i < 4; ++i) by[i] = load(m + block * 64 + i * 16), plus[i] = load(a + block * 64 + i * 16);
      fetch(rows, block, [&](const auto& codes64) {
        const uint8_t* row = rows.codes;
        T* to = out + block * 64;
        for (int64_t i = 0; i < n; ++i, row += rows.step, to += stride) {
          if (rows.packed) ask(row + block * 64);
          const __m512i codes = codes64(row);
          const auto number = [&](__m128i some, int j) {
            return fma(TABLED ? pick16(some, levels) : numbers16(some), by[j], plus[j]);
          };
          const __m128i quarter[4] = {_mm512_castsi512_si128(codes), _mm512_extracti32x4_epi32(codes, 1),
                                      _mm512_extracti32x4_epi32(codes, 2), _mm512_extracti32x4_epi32(codes, 3)};
          store32(to, number(quarter[0], 0), number(quarter[1], 1));
          store32(to + 32, number(quarter[2], 2), number(quarter[3], 3));
        }
      });
    }
  }
#else
  Rows rows_of(const uint8_t* codes, int64_t n) { return unpacked(codes, n); }

  template <bool TABLED>
  void token_rows(const Rows& rows, const float* m, const float* a, int64_t n, int64_t at, T* out) const {
    const Vec levels = load(store_.pages.levels);
    for (int64_t i = 0; i < n; ++i) {
      const Vec by = splat(m[i]), plus = splat(a[i]), table = fma(levels, by, plus);
      for (int64_t c = at; c < at + store_.pages.run; c += LANES) {
        const uint8_t* codes = rows.codes + i * rows.step + c;
        store(out + i * stride_ + c, TABLED ? pick16(codes, table) : fma(numbers16(codes), by, plus));
      }
    }
  }

  template <bool TABLED>
  void channel_rows(const Rows& rows, const float* m, const float* a, int64_t n, T* out) const {
    const Vec levels = load(store_.pages.levels);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < store_.d; c += LANES) {
        const uint8_t* codes = rows.codes + i * rows.step + c;
        const Vec level = TABLED ? pick16(codes, levels) : numbers16(codes);
        store(out + i * stride_ + c, fma(level, load(m + c), load(a + c)));
      }
  }
#endif

  Rows unpacked(const uint8_t* codes, int64_t n) {
    for (int64_t i = 0; i < n; ++i) planes_.unpack(codes + i * store_.pages.c_token, codes_ + i * stride_);
    return {codes_, stride_, false};
  }

  const PackedStore<T>& store_;
  CodePlanes planes_;
  int64_t stride_, next_ = 0;
  Scratch row_memory_, code_memory_, factor_memory_;
  T* rows_;
  uint8_t* codes_;
  float* factors_;
};

}  // namespace gw
