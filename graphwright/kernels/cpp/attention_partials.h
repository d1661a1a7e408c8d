// Partial results of query rows that wait for more keys, from one pass over the cache to the next.
#pragma once
#include "attention_rows.h"

namespace gw {

// (token, head) by (token, head); with one running result or more of each.
class Partials {
 public:
  Partials(Scratch& memory, int64_t tokens, int64_t heads, int64_t width, int states = 1)
      : heads_(heads), width_(width), states_(states) {
    data_ = memory.get<float>(tokens * heads * states * (width + 2));
  }
  // Row i of a tile; `from` is the first of its states, which follow each other.
  void keep(int64_t token, int64_t head, const Partial& from, int i) const {
    for (int s = 0; s < states_; ++s) {
      const Partial state = from.following(s);
      float* to = row(token, head, s);
      std::copy_n(state.weighted(i), width_, to);
      to[width_] = state.max()[i];
      to[width_ + 1] = state.sum()[i];
    }
  }
  void give(int64_t token, int64_t head, const Partial& to, int i) const {
    for (int s = 0; s < states_; ++s) {
      const Partial state = to.following(s);
      const float* from = row(token, head, s);
      std::copy_n(from, width_, state.weighted(i));
      state.max()[i] = from[width_];
      state.sum()[i] = from[width_ + 1];
    }
  }

 private:
  float* row(int64_t token, int64_t head, int state) const {
    return data_ + ((token * heads_ + head) * states_ + state) * (width_ + 2);
  }

  int64_t heads_, width_;
  int states_;
  float* data_;
};

}  // namespace gw
