// The best pages of each query, without sorting all of them: the lowest score that is still taken is found bit by
// bit, and one more pass over the pages in order writes the list.
#include <cstring>
#include <functional>

#include "page_scores.h"

namespace gw {
namespace {

constexpr int64_t SERIAL_PAGES = 1 << 14;  // fewer are done before other threads are awake

// A number whose order is that of the scores; NaN is highest.
uint32_t rank_of(float score) {
  score += 0.0f;  // no negative zero
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  const uint32_t rank = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return score != score ? 0xffffffffu : rank;
}

// Which ranks are taken: those above, and of those that are equal the first few.
struct Cut {
  uint32_t rank;
  int64_t equal;
};
constexpr Cut NOTHING{0xffffffffu, 0};

// The cut that takes `take` > 0 of `count` ranks.
Cut cut_of(const uint32_t* ranks, int64_t count, int64_t take) {
  const auto least = [=](uint32_t limit) {
    int32_t n = 0;
    for (int64_t i = 0; i < count; ++i) n += ranks[i] >= limit;
    return int64_t(n);
  };
  uint32_t limit = 0;
  for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
    const int64_t taken = least(limit | bit);
    if (taken >= take) limit |= bit;
    if (taken == take) break;
  }
  return {limit, take - (limit == 0xffffffffu ? 0 : least(limit + 1))};
}

// Of what `cut` takes, the fewest best that have `share` of all pages' mass.
// Source: He et al. 2024 (ZipVL), section 4.1.
Cut enough(const uint32_t* ranks, const float* scores, int64_t count, Cut cut, double share, uint64_t* best) {
  int64_t taken = 0;
  double total = 0.0, mass = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    total += double(scores[i]);
    if (ranks[i] > cut.rank || (ranks[i] == cut.rank && cut.equal-- > 0))
      best[taken++] = uint64_t(ranks[i]) << 32 | uint32_t(~i);
  }
  std::sort(best, best + taken, std::greater<>());
  Cut out = NOTHING;
  for (int64_t k = 0; k < taken; ++k) {
    const double score = double(scores[uint32_t(~best[k])]);
    mass += score;
    if (!(mass - score < total * share)) break;
    const auto rank = uint32_t(best[k] >> 32);
    out = {rank, k && rank == out.rank ? out.equal + 1 : 1};
  }
  return out;
}

void choose(const ChooseArgs& a, int64_t b, int64_t t, int64_t g, Scratch& rank_memory, Scratch& best_memory) {
  const Selection& s = a.step;
  const int64_t query = (b * s.tokens + t) * s.groups + g;
  if (t < s.dense[b]) {
    a.chosen[query] = -1;
    return;
  }
  const float* scores = a.scores + query * s.pages;
  int32_t* list = a.lists + query * s.pages;
  const int64_t all = s.so_far(b, t), end = std::min(all, s.pages), closed = std::min(s.candidates(b, t), end);
  const int64_t open = std::min(a.sinks, closed);  // pages [open, closed) are chosen from, all others read
  const int64_t count = closed - open;
  const int64_t budget = int64_t(std::ceil(float(all) * a.keep)) - (end - count);
  const int64_t take = std::clamp<int64_t>(budget, 0, count);
  uint32_t* ranks = rank_memory.get<uint32_t>(count);
  for (int64_t i = 0; i < count; ++i) ranks[i] = rank_of(scores[open + i]);
  Cut cut = take ? cut_of(ranks, count, take) : NOTHING;
  if (a.share != 0.0 && take)
    cut = enough(ranks, scores + open, count, cut, a.share, best_memory.get<uint64_t>(take));
  int64_t n = 0;
  for (int64_t page = 0; page < open; ++page) list[n++] = int32_t(page);
  for (int64_t i = 0; i < count; ++i) {  // no branches: which pages are taken has no pattern
    const bool tie = ranks[i] == cut.rank && cut.equal > 0;
    list[n] = int32_t(open + i);
    n += ranks[i] > cut.rank || tie;
    cut.equal -= tie;
  }
  for (int64_t page = closed; page < end; ++page) list[n++] = int32_t(page);
  a.chosen[query] = int32_t(n);
}

}  // namespace

void choose_pages(const ChooseArgs& a) {
  const Selection& s = a.step;
  const int64_t queries = s.batch * s.tokens * s.groups;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && queries * s.pages > SERIAL_PAGES)
  for (int64_t i = 0; i < queries; ++i) {
    static thread_local Scratch ranks, best;
    choose(a, i / s.groups / s.tokens, i / s.groups % s.tokens, i % s.groups, ranks, best);
  }
}

}  // namespace gw
