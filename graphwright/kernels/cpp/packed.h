// A packed store as plain pointers and strides (in elements): pages of codes, the newest tokens, the first tokens.
// What it means is in graphwright/ir/packed_ops.py.
#pragma once
#include "kernels.h"
#include "token_order.h"

namespace gw {

// A map of a head's features that keeps inner products: x @ matrix, or x picked by order.
struct Turn {
  const float* matrix;   // [d, d], or null
  const int64_t* order;  // [groups, d]
};
constexpr int MAX_TURNS = 4;

// A number is level(code) * m + a with m = scale * factor and a = low + m (a = 0 without low). The level is
// code * step + offset, or levels[code] for up to four bits.
struct Pages {
  int bits;                                 // of a code; 16: rows of bfloat16 numbers and nothing else
  const uint8_t* codes;                     // [batch, pages, groups, tokens, packed width], unit stride in the last
  int64_t c_batch, c_page, c_group, c_token;
  const bf16 *scale, *low;                  // [batch, pages, groups, tokens (, runs)] or [..., groups, d]; low or null
  int64_t s_batch, s_page, s_group, s_token, l_batch, l_page, l_group, l_token;
  bool by_channel;                          // the second form: a scale for each channel of a page
  int64_t run;                              // features that share a token's scale
  float factor, step, offset;
  float levels[16];
};

template <class T>
struct PackedStore {
  const int64_t* packed;                    // [batch]
  const T* tail;
  int64_t t_batch, t_group, t_slot, tail_slots;
  const T* first;
  int64_t f_batch, f_group, f_slot, first_tokens;
  Pages pages;
  int64_t page_tokens, page_count, d;
  Turn turn[MAX_TURNS];                     // in the order in which they were done before packing
  int turns;
};

template <class T>
struct PackedArgs {
  AttentionArgs<T> step;                    // without keys and values
  PackedStore<T> keys, values;
};

// Lists, if any: their pages are those of the stores, and `first` their first tokens.
template <class T>
void packed_attention(const PackedArgs<T>& args, const PageLists* lists = nullptr);

}  // namespace gw
