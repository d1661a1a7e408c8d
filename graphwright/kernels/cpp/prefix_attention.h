// A prefix that all rows of a batch share, as plain pointers and strides (in elements). What it means is in
// graphwright/ir/prefix_ops.py.
#pragma once
#include "kernels.h"

namespace gw {

template <class T>
struct PrefixArgs {
  // The step over each row's own tokens. With several rows of several tokens, q_batch = tokens * q_token.
  AttentionArgs<T> step;
  const T* keys;  // [groups, length, d]
  int64_t k_group, k_slot;
  const T* values;
  int64_t v_group, v_slot;
  int64_t length;
};

template <class T>
void prefix_attention(const PrefixArgs<T>& args);

}  // namespace gw
