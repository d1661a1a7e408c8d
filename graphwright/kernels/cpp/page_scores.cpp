// How much attention each page of a cache is estimated to get: inner products of queries with the pages' summaries,
// and a softmax over the pages. A summary is read once for all heads of its group and all tokens of the step.
//
// A page's score is one sum in one order, and a query's softmax goes over its own candidates in theirs: its bits are
// the same in every step, batch and number of threads.
#include "page_scores.h"

#include <cstring>
#include <limits>
#include <vector>

namespace gw {
namespace {

constexpr int64_t TASK_PAGES = 64;
constexpr int64_t WAVE_SCORES = int64_t(4) << 20;   // what is kept of raw scores
constexpr int64_t SERIAL_PRODUCTS = int64_t(1) << 20;  // less than this is done before other threads are awake
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// [low, high] with low <= high: the highest product that a key between them could have.
// Source: Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", section 3.3.
template <class T>
void prepare_bounds(const T* query, int64_t d, T* out) {
  for (int64_t i = 0; i < d; ++i) {
    const float x = to_float(query[i]);
    out[i] = from_float<T>(std::min(x, 0.0f));
    out[d + i] = from_float<T>(std::max(x, 0.0f));
  }
}

template <class T>
void prepare_mean(const T* query, int64_t d, T* out) { std::copy_n(query, d, out); }

// The sums of sixteen vectors' lanes.
#ifdef GW_AVX512
[[gnu::always_inline]] inline Vec sums16(const Vec* x) {
  Vec pair[8], quad[4];
  for (int i = 0; i < 8; ++i)
    pair[i] = add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
    quad[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halves = [](Vec a, Vec b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halves(halves(quad[0], quad[1]), halves(quad[2], quad[3]));
}
#else
inline Vec sums16(const Vec* x) {
  Vec r;
  for (int i = 0; i < LANES; ++i) r.v[i] = reduce_add(x[i]);
  return r;
}
#endif

// Inner products of a query, padded with zeros to a multiple of 32, with sixteen rows of `width`. Eight at a time, so
// that what they need stays in registers.
template <class T>
inline void dots8(const T* query, const T* const* rows, int64_t width, Vec* sum) {
  for (int i = 0; i < 8; ++i) sum[i] = splat(0.0f);
  for (int64_t c = 0; c < width; c += LANES) {
    const Vec x = load(query + c);
    for (int i = 0; i < 8; ++i) sum[i] = fma(x, load_up_to(rows[i] + c, width - c), sum[i]);
  }
}
#if defined(GW_AVX512) && defined(__AVX512BF16__)
inline void dots8(const bf16* query, const bf16* const* rows, int64_t width, Vec* sum) {
  const auto at = [=](int i, int64_t c) { return _mm512_loadu_si512(rows[i] + c); };
  for (int i = 0; i < 8; ++i) sum[i] = splat(0.0f);
  int64_t c = 0;
  for (; c + 32 <= width; c += 32) {
    const auto x = (__m512bh)_mm512_loadu_si512(query + c);
    for (int i = 0; i < 8; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], x, (__m512bh)at(i, c));
  }
  if (c == width) return;
  const auto mask = __mmask32((uint64_t(1) << (width - c)) - 1);
  const auto x = (__m512bh)_mm512_loadu_si512(query + c);
  for (int i = 0; i < 8; ++i)
    sum[i] = _mm512_dpbf16_ps(sum[i], x, (__m512bh)_mm512_maskz_loadu_epi16(mask, rows[i] + c));
}
#endif
template <class T>
inline Vec dots16(const T* query, const T* const* rows, int64_t width) {
  Vec sum[16];
  dots8(query, rows, width, sum);
  dots8(query, rows + 8, width, sum + 8);
  return sums16(sum);
}

// One call: the raw scores of units (a sequence and a group), some units at a time.
template <class T>
class Scoring {
 public:
  explicit Scoring(const ScoreArgs<T>& a)
      : a_(a), tokens_(a.step.tokens), shared_(a.heads / a.step.groups), width_(a.scorer->rows * a.d),
        padded_(round_up(width_, 32)), units_(a.step.batch * a.step.groups), candidates_(a.step.batch * tokens_) {
    for (int64_t b = 0; b < a.step.batch; ++b)
      for (int64_t t = 0; t < tokens_; ++t) {
        const bool asked = t >= a.step.dense[b] && t < a.counts[b];
        candidates_[b * tokens_ + t] = asked ? a.step.candidates(b, t) : -1;
        most_ = std::max(most_, candidates_[b * tokens_ + t]);
      }
    stride_ = round_up(std::max<int64_t>(most_, 1), 16);
  }

  void run() {
    if (most_ < 0) return;
    static thread_local Scratch memory;
    const int64_t unit_scores = tokens_ * shared_ * stride_;
    const int64_t wave = std::clamp<int64_t>(WAVE_SCORES / unit_scores, 1, units_);
    float* raw = memory.get<float>(wave * unit_scores);
    const int64_t blocks = (most_ + TASK_PAGES - 1) / TASK_PAGES;
    const bool few = units_ * unit_scores * width_ < SERIAL_PRODUCTS;
#pragma omp parallel num_threads(a_.threads) if (a_.threads > 1 && !few)
    {
      Scratch prepared;
      T* queries = prepared.get<T>(tokens_ * shared_ * padded_);
      int64_t ready = -1;
      for (int64_t start = 0; start < units_; start += wave) {
        const int64_t count = std::min(wave, units_ - start);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < count * blocks; ++task) {
          const int64_t unit = start + task / blocks;
          if (unit != ready) prepare(unit, queries);
          ready = unit;
          score(unit, task % blocks * TASK_PAGES, queries, raw + (unit - start) * unit_scores);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < count * tokens_; ++task)
          share_out(start + task / tokens_, task % tokens_, raw + task * shared_ * stride_);
      }
    }
  }

 private:
  int64_t of(int64_t unit, int64_t t) const { return candidates_[unit / a_.step.groups * tokens_ + t]; }

  void prepare(int64_t unit, T* queries) const {
    const int64_t b = unit / a_.step.groups, first = unit % a_.step.groups * shared_;
    for (int64_t t = 0; t < tokens_; ++t) {
      if (of(unit, t) <= 0) continue;
      for (int64_t h = 0; h < shared_; ++h) {
        T* to = queries + (t * shared_ + h) * padded_;
        a_.scorer->prepare(a_.q + b * a_.q_batch + (first + h) * a_.q_head + t * a_.q_token, a_.d, to);
        std::fill(to + width_, to + padded_, from_float<T>(0.0f));
      }
    }
  }

  // Raw scores of the pages of one task, [tokens, shared, stride].
  void score(int64_t unit, int64_t page, const T* queries, float* raw) const {
    const T* summary = a_.summary + unit / a_.step.groups * a_.s_batch + unit % a_.step.groups * a_.s_group;
    const Vec scale = splat(a_.scale);
    for (int64_t at = page; at < std::min(page + TASK_PAGES, most_); at += 16) {
      const T* rows[16];  // what is beyond the last candidate is not used
      for (int64_t i = 0; i < 16; ++i) rows[i] = summary + std::min(at + i, most_ - 1) * a_.s_page;
      for (int64_t i = at + 16; i < std::min(at + 32, most_); ++i) ask(summary + i * a_.s_page);
      for (int64_t t = 0; t < tokens_; ++t) {
        if (of(unit, t) <= at) continue;
        for (int64_t h = t * shared_; h < (t + 1) * shared_; ++h)
          store(raw + h * stride_ + at, mul(dots16(queries + h * padded_, rows, width_), scale));
      }
    }
  }

  // The group's part of a page lies apart from the next one's: the hardware does not guess it. Compilers drop calls of
  // functions that only prefetch, so it must not be one.
  [[gnu::always_inline]] inline void ask(const T* row) const {
    for (int64_t c = 0; c < width_; c += int64_t(64 / sizeof(T))) __builtin_prefetch(row + c, 0, 3);
  }

  // The mean over the group's heads of their softmax over the candidates.
  void share_out(int64_t unit, int64_t t, float* raw) const {
    const int64_t count = of(unit, t), pages = a_.step.pages;
    if (count < 0) return;
    const int64_t b = unit / a_.step.groups, g = unit % a_.step.groups;
    float* out = a_.out + ((b * tokens_ + t) * a_.step.groups + g) * pages;
    std::fill_n(out, pages, 0.0f);
    for (int64_t h = 0; h < shared_; ++h, raw += stride_) {
      const float by = 1.0f / (weigh(raw, count) * float(shared_));
      for (int64_t n = 0; n < count; n += LANES) {
        const int64_t left = pages - n;
        store_up_to(out + n, fma(load(raw + n), splat(by), load_up_to(out + n, left)), left);
      }
    }
  }

  // Scores to exp(score - highest) in place, 0 from `count` on; their sum.
  static float weigh(float* raw, int64_t count) {
    Vec top = splat(NEG_INF), total = splat(0.0f);
    for (int64_t n = 0; n < count; n += LANES) {
      if (n + LANES > count) store(raw + n, keep((1u << (count - n)) - 1, load(raw + n), NEG_INF));
      top = vmax(top, load(raw + n));
    }
    const float highest = reduce_max(top);
    const Vec minus = splat(highest == NEG_INF ? 0.0f : -highest);
    for (int64_t n = 0; n < count; n += LANES) {
      const Vec e = vexp(add(load(raw + n), minus));
      store(raw + n, e);
      total = add(total, e);
    }
    const float sum = reduce_add(total);
    return sum == 0.0f ? 1.0f : sum;
  }

  const ScoreArgs<T>& a_;
  int64_t tokens_, shared_, width_, padded_, units_, most_ = -1, stride_ = 0;
  std::vector<int64_t> candidates_;  // [batch, tokens]; -1: not asked for
};

}  // namespace

template <class T>
const PageScorer<T>* page_scorer(const char* selector) {
  static const PageScorer<T> scorers[] = {
      {"bounds", 2, prepare_bounds<T>},
      {"mean", 1, prepare_mean<T>},
  };
  for (const PageScorer<T>& one : scorers)
    if (!std::strcmp(one.name, selector)) return &one;
  return nullptr;
}
template const PageScorer<float>* page_scorer<float>(const char*);
template const PageScorer<bf16>* page_scorer<bf16>(const char*);

template <class T>
void score_pages(const ScoreArgs<T>& args) { Scoring<T>(args).run(); }
template void score_pages<float>(const ScoreArgs<float>&);
template void score_pages<bf16>(const ScoreArgs<bf16>&);

}  // namespace gw
