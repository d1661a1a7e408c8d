// The tokens that a query reads of a sequence, when it reads some pages of it only.
//
// They are numbered anew: the tokens before the first page, those of the listed pages, and those of the step itself,
// which are read whether their pages are listed or not. Their places begin with `shift`, so that a page of a multiple of 16 tokens begins at a multiple of 16. What cuts tokens into chunks and what
// looks at ranges of them works with places as it does with numbers, which they follow in order. In a tree, the step's
// own tokens are those of the query's path.
#pragma once
#include <algorithm>
#include <cstdint>

#include "tree_path.h"

namespace gw {

struct TokenOrder {
  const int32_t* pages;    // [count], ascending; those that begin before the step
  int64_t count, page, first;
  int64_t length, total;   // tokens before the step and after it, by number
  int64_t step;            // places before those of the step's own tokens, without the shift
  const TreePath* path = nullptr;

  static TokenOrder of(const int32_t* pages, int64_t count, int64_t page, int64_t first, int64_t length, int64_t total) {
    const int64_t before = std::max<int64_t>(0, length - first);
    count = std::lower_bound(pages, pages + count, (before + page - 1) / page) - pages;
    const int64_t end = count ? first + (pages[count - 1] + 1) * page : 0;
    return {pages, count, page, first, length, total, std::min(first, length) + count * page - std::max<int64_t>(0, end - length)};
  }
  int64_t shift() const { return (16 - first % 16) % 16; }
  // The token at a place.
  int64_t number(int64_t place) const {
    const int64_t at = place - shift();
    if (at >= step) return length + (path ? path->column[at - step] : at - step);
    return at < first ? at : first + pages[(at - first) / page] * page + (at - first) % page;
  }
  // The place of the first token that is read and has this number or a higher one.
  int64_t place(int64_t number) const {
    if (number >= length) return shift() + step + (path ? std::min(number - length, path->depth) : number - length);
    if (number <= first) return shift() + number;
    const int64_t wanted = (number - first) / page;
    const int64_t before = std::lower_bound(pages, pages + count, wanted) - pages;
    const bool listed = before < count && pages[before] == wanted;
    return shift() + std::min(step, first + before * page + (listed ? (number - first) % page : 0));
  }
  // See Sequence. Not inlined: the loops of steps without lists are to stay small.
  [[gnu::noinline]] int64_t after(int64_t t) const { return place(length + t + 1); }
  [[gnu::noinline]] int64_t column(int64_t place) const { return number(place) - length; }
  // How many tokens from a place on follow each other in number, at least.
  int64_t together(int64_t place) const {
    const int64_t at = place - shift();
    if (at >= step) return path ? 1 : total - length - (at - step);
    const int64_t own = at < first ? std::min(first, step) - at : page - (at - first) % page;
    // The page that the step's tokens are in goes on with them.
    return at + own > step ? step - at + (path ? 0 : total - length) : own;
  }
};

// The lists of all queries of a step; see graphwright/ir/sparse_ops.py.
struct PageLists {
  const int32_t* pages;   // [batch, tokens, groups, capacity], contiguous
  const int32_t* chosen;  // [batch, tokens, groups], contiguous; < 0: everything is read
  int64_t capacity, page, first;
};

}  // namespace gw
