// The two ops of sparse selection (graphwright/ir/sparse_ops.py) as plain pointers and strides (in elements).
#pragma once
#include <algorithm>

#include "kernels.h"

namespace gw {

constexpr int64_t SPARSE_TOKENS = 64;  // of a step at most; longer ones read everything

// Which pages of a step can be chosen.
struct Selection {
  const int64_t *positions, *lengths, *dense;  // [batch, tokens], [batch], [batch]; contiguous
  int64_t batch, tokens, groups, pages;        // pages: of the tensors
  int64_t page, first, recent, settled;
  // Pages below this are candidates of query t of row b; from here on all are read.
  int64_t candidates(int64_t b, int64_t t) const {
    const int64_t position = positions[b * tokens + t];
    const int64_t closed = std::min(position + 1 - recent, lengths[b] - settled) - first;
    return std::min(std::max<int64_t>(closed, 0) / page, pages);
  }
  // Pages that hold the tokens up to query t of row b.
  int64_t so_far(int64_t b, int64_t t) const {
    return (std::max<int64_t>(positions[b * tokens + t] + 1 - first, 0) + page - 1) / page;
  }
};

// A selector whose score of a page is an inner product with the page's summary.
template <class T>
struct PageScorer {
  const char* name;
  int64_t rows;                                        // a summary is [rows, d] for each group
  void (*prepare)(const T* query, int64_t d, T* out);  // what the summary is multiplied with, [rows, d]
};
// Null for a selector without a kernel.
template <class T>
const PageScorer<T>* page_scorer(const char* selector);

template <class T>
struct ScoreArgs {
  Selection step;
  const int64_t* counts;
  const PageScorer<T>* scorer;
  const T* q;
  int64_t q_batch, q_head, q_token;    // strides; unit stride along d
  const T* summary;
  int64_t s_batch, s_page, s_group;    // strides; [rows, d] is contiguous
  float* out;                          // [batch, tokens, groups, pages], contiguous
  int64_t heads, d;
  float scale;
  int threads;
};
// Writes nothing for queries that read everything, and for padding.
template <class T>
void score_pages(const ScoreArgs<T>& args);

struct ChooseArgs {
  Selection step;
  const float* scores;  // [batch, tokens, groups, pages], contiguous
  int64_t sinks;
  float keep;
  double share;
  int32_t *lists, *chosen;  // [batch, tokens, groups, pages] and without the last; contiguous
  int threads;
};
void choose_pages(const ChooseArgs& args);

}  // namespace gw
