// The items of a step whose queries read lists of pages, for any cache.
//
// Each query has a list of its own and is an item of its own, all heads of the group. Queries of a sequence that
// follow each other and read the same are items together; those that read everything have no order.
#pragma once
#include <vector>

#include "attention_driver.h"

namespace gw {

template <class T>
class ListedItems {
 public:
  ListedItems(const AttentionArgs<T>& a, const PageLists& lists) : a_(a) {
    const int64_t shared = a.heads / a.groups;
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t g = 0; g < a.groups; ++g)
        for (int64_t t = 0, next; t < a.tokens; t = next) {
          const int64_t query = (b * a.tokens + t) * a.groups + g;
          const bool listed = !everything(lists, b, t, g);
          const int32_t* pages = lists.pages + query * lists.capacity;
          Part part{b, g, 0, 0, listed, {}};
          if (listed)
            part.order = TokenOrder::of(pages, lists.chosen[query], lists.page, lists.first, a.lengths[b],
                                        a.lengths[b] + a.counts[b]);
          const auto same = [&](int64_t other) {
            if (everything(lists, b, other, g)) return !listed;
            const int64_t skip = (other - t) * a.groups;
            const int64_t count = lists.chosen[query + skip];
            return listed && count == lists.chosen[query] && std::equal(pages, pages + count, pages + skip * lists.capacity);
          };
          for (next = t + 1; next < a.tokens && same(next);) ++next;
          for (int64_t from = t * shared; from < next * shared; from += ITEM_ROWS) {
            part.from = from, part.to = std::min(next * shared, from + ITEM_ROWS);
            parts_.push_back(part);
          }
          any_ |= listed;
        }
  }
  // Does any query read a list?
  bool any() const { return any_; }
  int64_t count() const { return int64_t(parts_.size()); }
  template <class Cache>
  void fill(Item<T>& item, const Cache& cache, int64_t index) const {
    const Part& part = parts_[index];
    Sequence seq = sequence_of(a_, part.row);
    if (part.listed) {
      const TokenOrder& o = part.order;
      seq = {part.row, o.place(o.length), o.place(o.total), o.shift(), seq.plain, &o};
    }
    item.fill(a_, cache, seq, part.group, part.from, part.to);
  }

 private:
  struct Part {
    int64_t row, group, from, to;  // query rows [from, to) of the sequence and group
    bool listed;
    TokenOrder order;
  };
  // Padding reads nothing, however it is told to.
  bool everything(const PageLists& lists, int64_t b, int64_t t, int64_t g) const {
    return t >= a_.counts[b] || lists.chosen[(b * a_.tokens + t) * a_.groups + g] < 0;
  }

  const AttentionArgs<T>& a_;
  std::vector<Part> parts_;
  bool any_ = false;
};

// Over a cache in full precision that has a slot for every token.
template <class T>
void listed_attention(const AttentionArgs<T>& args, const PageLists& lists);

}  // namespace gw
