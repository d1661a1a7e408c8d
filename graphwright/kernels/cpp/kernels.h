// What the kernels take: plain pointers and strides (in elements). Nothing here knows about torch.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#include "vec.h"

namespace gw {

// Growing scratch memory, 64-byte aligned, kept by its thread.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    size_t bytes = (size_t(count) * sizeof(T) + 127) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// One weight of a linear group: out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n].
template <class T>
struct LinearWeight {
  const T* weight;    // [n, k], unit stride along k
  int64_t row_stride;
  int64_t n;
  const T* bias;      // [n] or null
  T* out;             // [m, n], contiguous
};

// x: [m, k] contiguous; made for m <= MAX_LINEAR_ROWS. The bits of an output row do not depend on m or threads.
constexpr int64_t MAX_LINEAR_ROWS = 64;
template <class T>
void linear_rows(const T* x, int64_t m, int64_t k, const LinearWeight<T>* weights, int64_t count, int threads);

// The tile version, for any m; false when a weight has a shape that it does not take.
bool linear_rows_amx(const bf16* x, int64_t m, int64_t k, const LinearWeight<bf16>* weights, int64_t count,
                     int threads);

// out[row] = weight[expert of row] x[row] + bias[expert of row], rows grouped by expert.
template <class T>
struct RoutedArgs {
  const T* weight;              // [experts, n, k], or [experts, k, n]; unit stride in the last dimension
  int64_t w_expert, w_row;      // its other strides
  const T* bias;                // [experts, n] with unit stride along n, or null
  int64_t b_expert;
  T* out;                       // [rows, n], contiguous
  int64_t n, k, groups;
  const int64_t* expert;        // [groups], the expert of each group
  const int64_t* start;         // [groups + 1], where its rows are in `rows` and `inputs`
  const int64_t* rows;          // output rows in order of their expert
  int threads;
};
// Weights [n, k]: dot products. Inputs: where each of `rows` begins in x.
template <class T>
void routed_dots(const RoutedArgs<T>& args, const T* const* inputs);
// Weights [k, n] (transposed): multiples of weight rows, added in order of k. Inputs in float32.
template <class T>
void routed_sums(const RoutedArgs<T>& args, const float* const* inputs);

template <class T>
struct AttentionArgs {
  const T* q;
  int64_t q_batch, q_head, q_token;         // strides; unit stride along d
  const T* keys;
  int64_t k_batch, k_group, k_slot;
  const T* values;
  int64_t v_batch, v_group, v_slot;
  const int64_t *positions, *lengths, *counts;  // [batch, tokens], [batch], [batch]; contiguous
  const int64_t* tree;                          // [batch, tokens] or null: a chain
  const float* sinks;                           // [heads] or null
  T* out;                                       // [batch, tokens, heads, e], contiguous
  int64_t batch, heads, groups, tokens, d, e, slots;
  float scale, softcap;
  int64_t window;
  int threads;
};

template <class T>
void cache_attention(const AttentionArgs<T>& args);

// store[b, g, (lengths[b] + t) % slots] = fresh[b, g, t] for t < counts[b].
struct AppendArgs {
  char* store;
  int64_t s_batch, s_group, s_slot;  // strides in bytes
  const char* fresh;
  int64_t f_batch, f_group, f_token, f_dim;
  const int64_t *lengths, *counts;
  int64_t batch, groups, tokens, slots, d, element;
};
void cache_append(const AppendArgs& args);

// The k largest entries of each row in descending order, of equal ones the first, and their log-softmax.
constexpr int MAX_TOP_TOKENS = 16;
template <class T>
struct TopTokensArgs {
  const T* logits;   // [rows, size], unit stride along a row
  int64_t stride, rows, size;
  int k;             // at most MAX_TOP_TOKENS and size
  int64_t* ids;      // [rows, k]
  float* log_probs;  // [rows, k]
  int threads;
};
template <class T>
void top_tokens(const TopTokensArgs<T>& args);

}  // namespace gw
