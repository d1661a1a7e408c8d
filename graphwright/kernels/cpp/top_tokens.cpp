// The largest entries of rows of logits, and their log-probabilities.
//
// A row is read twice. First its maximum is found block by block; only a block whose own maximum would join the list
// is looked at entry by entry. Then the exponentials are added up.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"

namespace gw {
namespace {

constexpr int64_t BLOCK = 8 * LANES;
constexpr float LEAST = -std::numeric_limits<float>::infinity();

// Entries in descending order, offered in order of their ids: of equal ones the first stays ahead.
class Best {
 public:
  explicit Best(int k) : k_(k) {}
  bool takes(float value) const { return count_ < k_ ? value == value : value > value_[k_ - 1]; }
  void offer(float value, int64_t id) {
    if (!takes(value)) return;
    int at = count_ < k_ ? count_++ : k_ - 1;
    for (; at > 0 && value_[at - 1] < value; --at) value_[at] = value_[at - 1], id_[at] = id_[at - 1];
    value_[at] = value, id_[at] = id;
  }
  // Places that only NaNs were left for are filled with them, as entry 0.
  void write(float log_sum, int64_t* ids, float* log_probs) const {
    for (int i = 0; i < k_; ++i) {
      ids[i] = i < count_ ? id_[i] : 0;
      log_probs[i] = i < count_ ? value_[i] - log_sum : std::numeric_limits<float>::quiet_NaN();
    }
  }

 private:
  int k_, count_ = 0;
  float value_[MAX_TOP_TOKENS];
  int64_t id_[MAX_TOP_TOKENS];
};

// Sixteen entries from `at` on; those past the end are the least.
template <class T>
Vec entries(const T* x, int64_t at, int64_t size) {
  if (at + LANES <= size) return load(x + at);
  return at < size ? keep((1u << (size - at)) - 1, load_n(x + at, int(size - at)), LEAST) : splat(LEAST);
}

template <class T>
void row_of(const T* x, int64_t size, int k, int64_t* ids, float* log_probs) {
  Best best(k);
  float top = LEAST;
  for (int64_t at = 0; at < size; at += BLOCK) {
    Vec most = entries(x, at, size);
    for (int64_t i = LANES; i < BLOCK; i += LANES) most = vmax(most, entries(x, at + i, size));
    const float block_top = reduce_max(most);
    top = std::max(top, block_top);
    if (!best.takes(block_top)) continue;
    for (int64_t i = at; i < std::min(at + BLOCK, size); ++i) best.offer(to_float(x[i]), i);
  }
  Vec sums[4];
  for (Vec& sum : sums) sum = splat(0.0f);
  const Vec minus = splat(-top);
  for (int64_t at = 0; at < size; at += 4 * LANES)
    for (int i = 0; i < 4; ++i) sums[i] = add(sums[i], vexp(add(entries(x, at + i * LANES, size), minus)));
  const float sum = reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  best.write(top + std::log(sum), ids, log_probs);
}

}  // namespace

template <class T>
void top_tokens(const TopTokensArgs<T>& a) {
  const int threads = a.rows * a.size < 65536 ? 1 : a.threads;  // else not worth waking the others
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < a.rows; ++row)
    row_of(a.logits + row * a.stride, a.size, a.k, a.ids + row * a.k, a.log_probs + row * a.k);
}

template void top_tokens<float>(const TopTokensArgs<float>&);
template void top_tokens<bf16>(const TopTokensArgs<bf16>&);

}  // namespace gw
